"""All algorithms by name. One explicit dict: to add one, write its file and its line here.

Importing it loads no torch.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType

from grpo.algorithms import (
    bnpo,
    cispo,
    dapo,
    disco,
    disco_scaling,
    dr_grpo,
    g2rpo_a,
    gdpo,
    gfpo,
    gpg,
    grpo,
    grpo_care,
    grpo_invariant,
    grpo_lambda,
    grpo_robust,
    gspo,
    gspo_token,
    guide,
    high_entropy,
    igrpo,
    lambda_grpo_length,
    lambda_grpo_prm,
    lite_ppo,
    luffy,
    mcts_dpo,
    multi_label,
    nthr,
    pods,
    prime,
    process_grpo,
    raft,
    raft_pp,
    rebel,
    reinforce_pp,
    reinforce_pp_baseline,
    reinforce_rej,
    rloo,
    s_grpo,
    sapo,
    sgpo,
    spo_chain,
    spo_tree,
    srpo,
    thr,
    tr_grpo,
    treepo,
    treerl,
    tw_grpo,
    unlikeliness,
    veripo,
    ws_grpo,
)
from grpo.algorithms.algorithm import Algorithm, Certainty, Kind
from grpo.algorithms.options import with_knobs, with_objective_knobs

__all__ = ["ALGORITHMS", "Algorithm"]


def _of(
    module: ModuleType, *, title: str, paper: str, kind: Kind, certainty: Certainty
) -> Algorithm:
    """The algorithm of one file of this folder, under the file's name."""
    return Algorithm(
        name=module.__name__.rpartition(".")[2],
        title=title,
        paper=paper,
        kind=kind,
        certainty=certainty,
        config=module.Config,
        pipeline=partial(with_knobs, module.pipeline),
        objective=partial(with_objective_knobs, module.objective),
    )


_MEMBERS = (
    _of(grpo, title="GRPO", paper="arXiv:2402.03300", kind="advantage", certainty="code"),
    _of(dr_grpo, title="Dr. GRPO", paper="arXiv:2503.20783", kind="loss", certainty="code"),
    _of(dapo, title="DAPO", paper="arXiv:2503.14476", kind="selection", certainty="code"),
    _of(
        lambda_grpo_prm,
        title="lambda-GRPO",
        paper="arXiv:2509.21154",
        kind="loss",
        certainty="code",
    ),
    _of(g2rpo_a, title="G2RPO-A", paper="arXiv:2508.13023", kind="sampling", certainty="code"),
    _of(gspo, title="GSPO", paper="arXiv:2507.18071", kind="loss", certainty="code"),
    _of(gspo_token, title="GSPO-token", paper="arXiv:2507.18071", kind="loss", certainty="code"),
    _of(ws_grpo, title="WS-GRPO", paper="arXiv:2602.17025", kind="process", certainty="secondary"),
    _of(sgpo, title="SGPO", paper="arXiv:2505.11595", kind="process", certainty="secondary"),
    _of(cispo, title="CISPO", paper="arXiv:2506.13585", kind="loss", certainty="code"),
    _of(sapo, title="SAPO", paper="arXiv:2511.20347", kind="loss", certainty="code"),
    _of(rloo, title="RLOO", paper="arXiv:2402.14740", kind="advantage", certainty="code"),
    _of(
        reinforce_pp,
        title="REINFORCE++",
        paper="arXiv:2501.03262",
        kind="advantage",
        certainty="code",
    ),
    _of(
        reinforce_pp_baseline,
        title="REINFORCE++-baseline",
        paper="arXiv:2501.03262",
        kind="advantage",
        certainty="code",
    ),
    _of(gpg, title="GPG", paper="arXiv:2504.02546", kind="advantage", certainty="code"),
    _of(raft, title="RAFT", paper="arXiv:2304.06767", kind="selection", certainty="code"),
    _of(raft_pp, title="RAFT++", paper="arXiv:2504.11343", kind="selection", certainty="code"),
    _of(
        reinforce_rej,
        title="Reinforce-Rej",
        paper="arXiv:2504.11343",
        kind="selection",
        certainty="code",
    ),
    _of(pods, title="PODS", paper="arXiv:2504.13818", kind="selection", certainty="code"),
    _of(gfpo, title="GFPO", paper="arXiv:2508.09726", kind="selection", certainty="paper"),
    _of(gdpo, title="GDPO", paper="arXiv:2601.05242", kind="advantage", certainty="code"),
    _of(
        unlikeliness,
        title="Unlikeliness reward",
        paper="arXiv:2506.02355",
        kind="reward",
        certainty="code",
    ),
    _of(tr_grpo, title="TR-GRPO", paper="arXiv:2511.00066", kind="weights", certainty="secondary"),
    _of(
        grpo_lambda,
        title="GRPO-lambda",
        paper="arXiv:2510.00194",
        kind="weights",
        certainty="reconstructed",
    ),
    _of(
        grpo_robust,
        title="Group-robust GRPO",
        paper="arXiv:2405.20304",
        kind="weights",
        certainty="reconstructed",
    ),
    _of(lite_ppo, title="Lite PPO", paper="arXiv:2508.08221", kind="advantage", certainty="code"),
    _of(
        grpo_invariant,
        title="Group-invariant GRPO",
        paper="arXiv:2310.11971",
        kind="weights",
        certainty="reconstructed",
    ),
    _of(bnpo, title="BNPO", paper="TRL loss_type bnpo", kind="loss", certainty="code"),
    _of(nthr, title="NTHR", paper="arXiv:2505.18830", kind="weights", certainty="paper"),
    _of(thr, title="THR", paper="arXiv:2510.03669", kind="weights", certainty="reconstructed"),
    _of(tw_grpo, title="TW-GRPO", paper="arXiv:2505.24718", kind="weights", certainty="code"),
    _of(
        high_entropy,
        title="80/20 entropy rule",
        paper="arXiv:2506.01939",
        kind="weights",
        certainty="code",
    ),
    _of(disco, title="DisCO", paper="arXiv:2505.12366", kind="loss", certainty="code"),
    _of(rebel, title="REBEL", paper="arXiv:2404.16767", kind="loss", certainty="code"),
    _of(
        lambda_grpo_length,
        title="lambda-GRPO, learnable length preference",
        paper="arXiv:2510.06870",
        kind="loss",
        certainty="secondary",
    ),
    _of(grpo_care, title="GRPO-CARE", paper="arXiv:2506.16141", kind="reward", certainty="code"),
    _of(
        multi_label,
        title="Multi-label reward regression",
        paper="arXiv:2503.21819",
        kind="reward",
        certainty="secondary",
    ),
    _of(disco_scaling, title="DISCO", paper="arXiv:2505.15074", kind="reward", certainty="code"),
    _of(igrpo, title="iGRPO", paper="arXiv:2602.09000", kind="sampling", certainty="secondary"),
    _of(guide, title="Guide-GRPO", paper="arXiv:2506.13923", kind="sampling", certainty="code"),
    _of(luffy, title="LUFFY", paper="arXiv:2504.14945", kind="sampling", certainty="code"),
    _of(s_grpo, title="S-GRPO", paper="arXiv:2505.07686", kind="sampling", certainty="secondary"),
    _of(srpo, title="SRPO", paper="arXiv:2504.14286", kind="selection", certainty="secondary"),
    _of(
        process_grpo,
        title="GRPO with process supervision",
        paper="arXiv:2402.03300",
        kind="process",
        certainty="paper",
    ),
    _of(prime, title="PRIME", paper="arXiv:2502.01456", kind="process", certainty="code"),
    _of(treepo, title="TreePO", paper="arXiv:2508.17445", kind="tree", certainty="code"),
    _of(treerl, title="TreeRL", paper="arXiv:2506.11902", kind="tree", certainty="code"),
    _of(spo_chain, title="SPO-chain", paper="arXiv:2505.23564", kind="tree", certainty="code"),
    _of(spo_tree, title="SPO-tree", paper="arXiv:2505.23564", kind="tree", certainty="code"),
    _of(mcts_dpo, title="MCTS-DPO", paper="arXiv:2405.00451", kind="stage", certainty="code"),
    _of(veripo, title="VerIPO", paper="arXiv:2505.19000", kind="stage", certainty="reconstructed"),
)

ALGORITHMS: dict[str, Algorithm] = {member.name: member for member in _MEMBERS}
