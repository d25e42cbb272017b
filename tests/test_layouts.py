"""Layouts: names and numbers map one to one, and a tracker is believed only when it makes sense."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncckpt.errors import CorruptStepError, LoadError, OptionError, StepError
from asyncckpt.layouts import LAYOUTS, DcpLayout, Layout, MegatronLayout, dcp, layout_named, megatron

each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@each_layout
@settings(deadline=None)
@given(step=st.integers(0, 10**18 - 1))
def test_step_names_round_trip(layout: Layout, step: int) -> None:
    assert layout.parse_step(layout.step_name(step)) == step


@each_layout
@settings(deadline=None)
@given(data=st.data())
def test_parsing_is_the_strict_inverse(layout: Layout, data: st.DataObject) -> None:
    prefix = layout.step_name(0).rstrip("0")
    name = prefix + data.draw(st.text(st.sampled_from("0123456789+-_ .\n٣²x"), max_size=20))
    step = layout.parse_step(name)
    assert step is None or layout.step_name(step) == name


def test_known_names() -> None:
    assert DcpLayout().step_name(50) == "step-50"
    assert MegatronLayout().step_name(50) == "iter_0000050"
    assert MegatronLayout().step_name(12345678) == "iter_12345678"
    assert dcp.data_path(1) == "__1_0.distcp"
    assert megatron.ModelRank().model_path == "mp_rank_00/model_optim_rng.pt"


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (layout, prefix + tail)
        for layout, prefix, pad in ((DcpLayout(), "step-", ""), (MegatronLayout(), "iter_", "000000"))
        for tail in (
            "", f"+{pad}5", f"-{pad}5", f"{pad}5 ", f"{pad}5\n", f" {pad}5", f"0{pad}5", f"{pad}٣", f"{pad}²",
            f"{pad}5_0", f"{pad}5.0", f"{pad}0x5", f"{pad}5.tmp", "9" * 19, "9" * 5000,
        )
    ],
)  # fmt: skip
def test_names_that_are_no_steps(layout: Layout, name: str) -> None:
    assert layout.parse_step(name) is None


@each_layout
def test_negative_steps_have_no_name(layout: Layout) -> None:
    with pytest.raises(StepError, match="-1 is negative"):
        layout.step_name(-1)


def test_tracker_round_trip() -> None:
    layout = MegatronLayout()
    assert layout.tracker_name == "latest_checkpointed_iteration.txt"
    assert layout.tracker_bytes(50) == b"50"
    assert layout.parse_tracker(b"50") == 50
    assert layout.parse_tracker(b"50\n") == 50


@pytest.mark.parametrize(
    "data", [b"", b"\n", b"-5", b"+5", b"5 6", b"0x5", b"\xff", b"5.0", "٣".encode(), b"9" * 5000]
)
def test_garbled_trackers(data: bytes) -> None:
    with pytest.raises(CorruptStepError, match="iteration number expected"):
        MegatronLayout().parse_tracker(data)


def test_release_is_no_damage() -> None:
    with pytest.raises(LoadError, match="converted weights") as caught:
        MegatronLayout().parse_tracker(b"release")
    assert not isinstance(caught.value, CorruptStepError)


def test_dcp_has_no_tracker() -> None:
    assert DcpLayout().tracker_name is None
    with pytest.raises(OptionError):
        DcpLayout().tracker_bytes(1)
    with pytest.raises(OptionError):
        DcpLayout().parse_tracker(b"1")


@pytest.mark.parametrize(
    ("layout", "names", "tracked", "problem"),
    [
        (DcpLayout(), [".metadata", "__0_0.distcp"], None, None),
        (DcpLayout(), ["__0_0.distcp"], None, "never finished"),
        (DcpLayout(), [], None, "never finished"),
        (MegatronLayout(), ["mp_rank_00"], 50, None),
        (MegatronLayout(), ["mp_rank_00"], 60, None),
        (MegatronLayout(), ["mp_rank_00"], 49, "beyond the tracker, which names 49"),
        (MegatronLayout(), ["mp_rank_00"], None, "vouches"),
        (MegatronLayout(), [".metadata", "metadata.json"], 50, "no mp_rank"),
    ],
)
def test_foreign_steps(layout: Layout, names: list[str], tracked: int | None, problem: str | None) -> None:
    found = layout.foreign_problem(50, names, tracked)
    assert (found is None) == (problem is None)
    assert problem is None or problem in (found or "")


def test_layouts_by_name() -> None:
    assert layout_named("megatron") == MegatronLayout()
    with pytest.raises(OptionError, match="unknown layout 'zip'; there are: dcp, megatron"):
        layout_named("zip")
