"""A weight stream between real members: what arrives, what is refused, who is missed.

Both ways: over gloo, and from memory that the members share.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
from torch import Tensor

import grpo.weight_group
import grpo.weight_stream
import learner.weight_sender
from grpo.errors import WeightMismatch
from grpo.types import WeightBundle
from grpo.weight_image import tensors_in
from grpo.weight_stream import bucket_sum
from learner.weight_images import WeightImages, pass_on
from learner.weight_sender import WeightSender
from rollout_workers.weight_receiver import WeightReceiver
from tests.unit.stream_members import CPU, Spoiling, in_thread, met, received, send

DEADLINE_S = 60


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(learner.weight_sender, "BUCKET_BYTES", 512)
    yield


@pytest.fixture(params=[False, True], ids=["gloo", "shared"])
def is_local(request: pytest.FixtureRequest) -> bool:
    found: bool = request.param
    return found


def weights() -> list[dict[str, Tensor]]:
    """Two parts: buckets of several, of one that is larger than a bucket, and of odd ones."""
    generator = torch.Generator().manual_seed(0)
    return [
        {f"small.{i}": torch.randn(5, 7, generator=generator) for i in range(5)},
        {
            "large": torch.randn(33, 40, generator=generator),
            "none": torch.zeros(0, 4),
            "count": torch.tensor(7),
            "flags": torch.tensor([True, False, True]),
        },
    ]


def merged(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: weight for part in parts for name, weight in part.items()}


def test_the_sum_of_a_bucket_is_that_of_odd_multiples_of_its_words() -> None:
    words = torch.tensor([3, 5, -1])  # 3 * 1 + 5 * 3 - 1 * 5 = 13
    assert bucket_sum(words.view(torch.uint8)) == 13
    assert bucket_sum((-words).view(torch.uint8)) == 2**64 - 13


def test_a_bit_that_turned_shows_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpo.weight_stream, "CHECKED_WORDS", 4)  # several turns
    bucket = torch.randint(0, 256, (80,), dtype=torch.uint8)
    expected = bucket_sum(bucket)
    for byte in range(80):
        for bit in range(8):
            bucket[byte] ^= 1 << bit
            assert bucket_sum(bucket) != expected
            bucket[byte] ^= 1 << bit
    assert bucket_sum(bucket) == expected
    assert bucket_sum(bucket.view(10, 8).flip(0).flatten()) != expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_member_receives_all_weights_in_the_dtype_of_the_rollouts(
    dtype: torch.dtype, is_local: bool
) -> None:
    sender, receivers = WeightSender(CPU, dtype), [WeightReceiver(CPU) for _ in range(2)]
    group = met(sender, receivers=2, is_local=is_local)
    for version in (1, 2):  # the group stays together
        sent = in_thread(lambda v=version: send(sender, group, weights(), version=v))
        found = [
            in_thread(lambda r=r, k=k, v=version: received(r, group, rank=1 + k, version=v))
            for k, r in enumerate(receivers)
        ]
        for future in found:
            buckets = future.result(DEADLINE_S)
            assert isinstance(buckets, list) and len(buckets) > 2
            whole = merged(buckets)
            assert whole.keys() == merged(weights()).keys()
            for name, weight in merged(weights()).items():
                expected = weight.to(dtype) if weight.is_floating_point() else weight
                assert torch.equal(whole[name], expected)
        sent.result(DEADLINE_S)


def test_weights_travel_under_the_names_that_their_image_has(is_local: bool) -> None:
    sender, receiver = WeightSender(CPU, torch.float32), WeightReceiver(CPU)
    group = met(sender, receivers=1, is_local=is_local)
    images = WeightImages(
        {name: torch.empty_like(weight) for name, weight in merged(weights()).items()},
        as_saved=lambda gathered: {f"saved.{name}": w.clone() for name, w in gathered.items()},
    )
    sent = in_thread(
        lambda: images.bundle(weights(), version=1, sender=sender.begun(group, version=1))
    )
    found = merged(received(receiver, group))
    bundle = sent.result(DEADLINE_S)
    assert isinstance(bundle, WeightBundle)
    image = tensors_in(bundle.payload)
    assert found.keys() == image.keys() == {f"saved.{name}" for name in merged(weights())}
    assert all(torch.equal(found[name], image[name]) for name in image)


def test_a_bucket_that_was_spoilt_is_refused_and_none_after_it_is_used(is_local: bool) -> None:
    sender, receiver = WeightSender(CPU, torch.float32), WeightReceiver(CPU)
    group = met(sender, receivers=1, is_local=is_local)

    def spoil() -> None:
        sender._member = Spoiling(sender._member, bucket=1, byte=9)  # type: ignore[assignment]

    sent = in_thread(lambda: send(sender, group, weights(), before=spoil))
    used: list[dict[str, Tensor]] = []
    stream = grpo.weight_stream.WeightStream(group=group, first_rank=1, version=1)
    with pytest.raises(WeightMismatch, match=r"small\.2 to small\.3 arrived with sum"):
        used.extend(receiver.buckets(stream, process=0))
    sent.result(DEADLINE_S)
    assert sender._failure is None  # the others need not suffer from it


def test_a_sender_that_gives_up_says_so_at_once(is_local: bool) -> None:
    sender, receiver = WeightSender(CPU, torch.float32), WeightReceiver(CPU)
    group = met(sender, receivers=1, is_local=is_local)
    impossible = {"elsewhere": torch.zeros(1, device="meta")}
    sent = in_thread(lambda: send(sender, group, [*weights(), impossible, *weights()]))
    with pytest.raises(RuntimeError, match="the learner gave up: "):
        received(receiver, group)
    sent.result(DEADLINE_S)


def test_a_member_that_never_comes_is_not_waited_for_long(
    monkeypatch: pytest.MonkeyPatch, is_local: bool
) -> None:
    monkeypatch.setattr(grpo.weight_group, "PATIENCE", timedelta(seconds=1))
    sender, receiver = WeightSender(CPU, torch.float32), WeightReceiver(CPU)
    group = met(sender, receivers=2, is_local=is_local)
    sent = in_thread(lambda: send(sender, group, weights()))
    with pytest.raises(RuntimeError):
        received(receiver, group)
    receiver.leave()
    sent.result(DEADLINE_S)  # whoever publishes hears of nothing
    assert sender._failure is not None
    group = met(sender, receivers=1, is_local=is_local)
    sent = in_thread(lambda: send(sender, group, weights(), version=2))
    assert len(merged(received(receiver, group, version=2))) == 9
    sent.result(DEADLINE_S)


def test_a_rank_without_an_image_sends_what_the_image_holds(is_local: bool) -> None:
    sender, receiver = WeightSender(CPU, torch.float32), WeightReceiver(CPU)
    group = met(sender, receivers=1, is_local=is_local)

    def renamed(gathered: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"saved.{name}": weight for name, weight in gathered.items()}

    for version, as_saved in enumerate((None, renamed)):
        sent = in_thread(
            lambda v=version, s=as_saved: pass_on(weights(), sender.begun(group, v), as_saved=s)
        )
        found = merged(received(receiver, group, version=version))
        sent.result(DEADLINE_S)
        expected = merged(weights()) if as_saved is None else renamed(merged(weights()))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_member_that_leaves_is_not_waited_for() -> None:
    """Within shared memory nobody else can tell: it says so itself."""
    sender, receiver = WeightSender(CPU, torch.float32), WeightReceiver(CPU)
    group = met(sender, receivers=1, is_local=True)
    sent = in_thread(lambda: send(sender, group, weights()))
    stream = grpo.weight_stream.WeightStream(group=group, first_rank=1, version=1)
    next(receiver.buckets(stream, process=0))
    receiver.leave()
    sent.result(10)  # PATIENCE is 60
    assert sender._failure is not None and "member 1 of the group has left it" in sender._failure
