"""All algorithms by name. One explicit dict: to add one, write its file and its line here.

Importing it loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from grpo.algorithms import (
    cispo,
    dapo,
    disco_scaling,
    dr_grpo,
    g2rpo_a,
    gdpo,
    gfpo,
    gpg,
    grpo,
    grpo_invariant,
    grpo_lambda,
    grpo_robust,
    gspo,
    gspo_token,
    lambda_grpo_prm,
    lite_ppo,
    pods,
    raft,
    raft_pp,
    reinforce_pp,
    reinforce_pp_baseline,
    reinforce_rej,
    rloo,
    sapo,
    sgpo,
    tr_grpo,
    unlikeliness,
    ws_grpo,
)
from grpo.config import AlgorithmConfig
from grpo.objective import Objective
from grpo.pipeline import Pipeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """An algorithm's settings and its two halves, both built from the settings alone."""

    name: str  # as recipes write it
    title: str
    paper: str
    config: type[AlgorithmConfig]
    pipeline: Callable[..., Pipeline]  # (config, *, outcomes, max_completion_length)
    objective: Callable[..., Objective]  # (config)


ALGORITHMS: dict[str, Algorithm] = {
    "grpo": Algorithm(
        name="grpo",
        title="GRPO",
        paper="arXiv:2402.03300",
        config=grpo.Config,
        pipeline=grpo.pipeline,
        objective=grpo.objective,
    ),
    "dr_grpo": Algorithm(
        name="dr_grpo",
        title="Dr. GRPO",
        paper="arXiv:2503.20783",
        config=dr_grpo.Config,
        pipeline=dr_grpo.pipeline,
        objective=dr_grpo.objective,
    ),
    "dapo": Algorithm(
        name="dapo",
        title="DAPO",
        paper="arXiv:2503.14476",
        config=dapo.Config,
        pipeline=dapo.pipeline,
        objective=dapo.objective,
    ),
    "lambda_grpo_prm": Algorithm(
        name="lambda_grpo_prm",
        title="lambda-GRPO",
        paper="arXiv:2509.21154",
        config=lambda_grpo_prm.Config,
        pipeline=lambda_grpo_prm.pipeline,
        objective=lambda_grpo_prm.objective,
    ),
    "g2rpo_a": Algorithm(
        name="g2rpo_a",
        title="G2RPO-A",
        paper="arXiv:2508.13023",
        config=g2rpo_a.Config,
        pipeline=g2rpo_a.pipeline,
        objective=g2rpo_a.objective,
    ),
    "gspo": Algorithm(
        name="gspo",
        title="GSPO",
        paper="arXiv:2507.18071",
        config=gspo.Config,
        pipeline=gspo.pipeline,
        objective=gspo.objective,
    ),
    "gspo_token": Algorithm(
        name="gspo_token",
        title="GSPO-token",
        paper="arXiv:2507.18071",
        config=gspo_token.Config,
        pipeline=gspo_token.pipeline,
        objective=gspo_token.objective,
    ),
    "ws_grpo": Algorithm(
        name="ws_grpo",
        title="WS-GRPO",
        paper="arXiv:2602.17025",
        config=ws_grpo.Config,
        pipeline=ws_grpo.pipeline,
        objective=ws_grpo.objective,
    ),
    "sgpo": Algorithm(
        name="sgpo",
        title="SGPO",
        paper="arXiv:2505.11595",
        config=sgpo.Config,
        pipeline=sgpo.pipeline,
        objective=sgpo.objective,
    ),
    "cispo": Algorithm(
        name="cispo",
        title="CISPO",
        paper="arXiv:2506.13585",
        config=cispo.Config,
        pipeline=cispo.pipeline,
        objective=cispo.objective,
    ),
    "sapo": Algorithm(
        name="sapo",
        title="SAPO",
        paper="arXiv:2511.20347",
        config=sapo.Config,
        pipeline=sapo.pipeline,
        objective=sapo.objective,
    ),
    "rloo": Algorithm(
        name="rloo",
        title="RLOO",
        paper="arXiv:2402.14740",
        config=rloo.Config,
        pipeline=rloo.pipeline,
        objective=rloo.objective,
    ),
    "reinforce_pp": Algorithm(
        name="reinforce_pp",
        title="REINFORCE++",
        paper="arXiv:2501.03262",
        config=reinforce_pp.Config,
        pipeline=reinforce_pp.pipeline,
        objective=reinforce_pp.objective,
    ),
    "reinforce_pp_baseline": Algorithm(
        name="reinforce_pp_baseline",
        title="REINFORCE++-baseline",
        paper="arXiv:2501.03262",
        config=reinforce_pp_baseline.Config,
        pipeline=reinforce_pp_baseline.pipeline,
        objective=reinforce_pp_baseline.objective,
    ),
    "gpg": Algorithm(
        name="gpg",
        title="GPG",
        paper="arXiv:2504.02546",
        config=gpg.Config,
        pipeline=gpg.pipeline,
        objective=gpg.objective,
    ),
    "raft": Algorithm(
        name="raft",
        title="RAFT",
        paper="arXiv:2304.06767",
        config=raft.Config,
        pipeline=raft.pipeline,
        objective=raft.objective,
    ),
    "raft_pp": Algorithm(
        name="raft_pp",
        title="RAFT++",
        paper="arXiv:2504.11343",
        config=raft_pp.Config,
        pipeline=raft_pp.pipeline,
        objective=raft_pp.objective,
    ),
    "reinforce_rej": Algorithm(
        name="reinforce_rej",
        title="Reinforce-Rej",
        paper="arXiv:2504.11343",
        config=reinforce_rej.Config,
        pipeline=reinforce_rej.pipeline,
        objective=reinforce_rej.objective,
    ),
    "pods": Algorithm(
        name="pods",
        title="PODS",
        paper="arXiv:2504.13818",
        config=pods.Config,
        pipeline=pods.pipeline,
        objective=pods.objective,
    ),
    "gfpo": Algorithm(
        name="gfpo",
        title="GFPO",
        paper="arXiv:2508.09726",
        config=gfpo.Config,
        pipeline=gfpo.pipeline,
        objective=gfpo.objective,
    ),
    "gdpo": Algorithm(
        name="gdpo",
        title="GDPO",
        paper="arXiv:2601.05242",
        config=gdpo.Config,
        pipeline=gdpo.pipeline,
        objective=gdpo.objective,
    ),
    "unlikeliness": Algorithm(
        name="unlikeliness",
        title="Unlikeliness reward",
        paper="arXiv:2506.02355",
        config=unlikeliness.Config,
        pipeline=unlikeliness.pipeline,
        objective=unlikeliness.objective,
    ),
    "tr_grpo": Algorithm(
        name="tr_grpo",
        title="TR-GRPO",
        paper="arXiv:2511.00066",
        config=tr_grpo.Config,
        pipeline=tr_grpo.pipeline,
        objective=tr_grpo.objective,
    ),
    "grpo_lambda": Algorithm(
        name="grpo_lambda",
        title="GRPO-lambda",
        paper="arXiv:2510.00194",
        config=grpo_lambda.Config,
        pipeline=grpo_lambda.pipeline,
        objective=grpo_lambda.objective,
    ),
    "grpo_robust": Algorithm(
        name="grpo_robust",
        title="Group-robust GRPO",
        paper="arXiv:2405.20304",
        config=grpo_robust.Config,
        pipeline=grpo_robust.pipeline,
        objective=grpo_robust.objective,
    ),
    "lite_ppo": Algorithm(
        name="lite_ppo",
        title="Lite PPO",
        paper="arXiv:2508.08221",
        config=lite_ppo.Config,
        pipeline=lite_ppo.pipeline,
        objective=lite_ppo.objective,
    ),
    "grpo_invariant": Algorithm(
        name="grpo_invariant",
        title="Group-invariant GRPO",
        paper="arXiv:2310.11971",
        config=grpo_invariant.Config,
        pipeline=grpo_invariant.pipeline,
        objective=grpo_invariant.objective,
    ),
    "disco_scaling": Algorithm(
        name="disco_scaling",
        title="DISCO",
        paper="arXiv:2505.15074",
        config=disco_scaling.Config,
        pipeline=disco_scaling.pipeline,
        objective=disco_scaling.objective,
    ),
}
