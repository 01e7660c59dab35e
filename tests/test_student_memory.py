"""Predicted memory: checked against measured peaks, and the truth about small machines. Needs no torch."""

from __future__ import annotations

import pytest

from selfinstruct.student.memory import CARDS, CONTEXT, LLAMA_7B, Shape, choose, predict
from selfinstruct.student.train import fits
from selfinstruct.student.train.recipes import recipe


def test_llama_7b_has_its_number_of_parameters() -> None:
    assert LLAMA_7B.parameters == 6_738_415_616
    assert LLAMA_7B.lora_parameters(8, ("q_proj", "v_proj")) == 4_194_304


@pytest.mark.parametrize(
    ("compiled", "tokens", "measured_gib"), [(True, 8192, 71), (False, 8192, 85), (False, 16384, 131)]
)
def test_predictions_meet_peaks_measured_on_an_h200(compiled: bool, tokens: int, measured_gib: float) -> None:
    # Those runs had bfloat16 moments, no master weights, and one micro-batch a step: no gradients at the peak.
    plan = predict(LLAMA_7B, "full", tokens=tokens, adam_state="bf16", compiled=compiled)
    total = plan.total - plan.parts["master (low halves)"] - plan.parts["gradients"]
    assert total / 2**30 == pytest.approx(measured_gib, rel=0.06)


def test_full_training_takes_exact_moments_where_they_fit_and_says_why_not() -> None:
    big = choose(LLAMA_7B, "full", CARDS[141], step_tokens=18000, longest=512)
    small = choose(LLAMA_7B, "full", CARDS[80], step_tokens=18000, longest=512)
    assert big is not None
    assert small is not None
    assert (big.adam_state, big.checkpointed_layers) == ("fp32", 0)
    assert small.adam_state == "8bit"
    assert "because fp32 would not fit" in small.reason
    assert choose(LLAMA_7B, "full", CARDS[48], step_tokens=18000, longest=512) is None


def test_weights_are_split_over_gpus_only_when_memory_asks_for_it() -> None:
    roomy = choose(LLAMA_7B, "full", CARDS[141], step_tokens=9000, longest=512, world=2)
    tight = choose(LLAMA_7B, "full", CARDS[24], step_tokens=2250, longest=512, world=8)
    asked = choose(LLAMA_7B, "full", CARDS[141], step_tokens=9000, longest=512, world=2, scheme="weights")
    assert roomy is not None
    assert tight is not None
    assert asked is not None
    assert [plan.scheme for plan in (roomy, tight, asked)] == ["states", "weights", "weights"]
    assert [plan.adam_state for plan in (roomy, tight, asked)] == ["fp32"] * 3
    assert "weights whole on each GPU" in roomy.reason
    assert "in parts on the GPUs" in tight.reason
    # Two H200, a step in one micro-batch a GPU: seen with whole weights 82.5 GiB, with split ones 77.1 GiB.
    for scheme, seen in (("states", 82.5), ("weights", 77.1)):
        plan = predict(LLAMA_7B, "full", tokens=9792, world=2, scheme=scheme, accumulates=False)
        assert plan.allocated / 2**30 == pytest.approx(seen, rel=0.03)


def test_only_tokens_with_a_label_meet_the_head() -> None:
    def loss(tokens: int, share: float) -> int:
        return predict(LLAMA_7B, "full", tokens=tokens, label_share=share).parts["loss"]

    # The logits of 4,096 labels at once, whatever there are in all: 10 bytes for each of 32,000 words.
    logits = 4096 * 32000 * 10
    assert logits < loss(16384, 0.25) < loss(16384, 1.0) < logits * 1.25
    assert loss(4096, 0.25) < loss(4096, 1.0) / 3
    some, all_labels = (
        choose(LLAMA_7B, "full", CARDS[80], step_tokens=18000, longest=512, label_share=share) for share in (0.3, 1.0)
    )
    assert some is not None
    assert all_labels is not None
    assert some.checkpointed_layers <= all_labels.checkpointed_layers


def test_layers_are_recomputed_only_when_memory_asks_for_it() -> None:
    roomy = choose(LLAMA_7B, "lora", CARDS[80], step_tokens=18000, longest=512)
    tight = choose(LLAMA_7B, "lora", CARDS[24], step_tokens=18000, longest=512)
    assert roomy is not None
    assert tight is not None
    assert roomy.checkpointed_layers == 0 < tight.checkpointed_layers
    assert "computed twice" in tight.reason


def test_every_plan_fits_its_card() -> None:
    for fit in fits.fits(LLAMA_7B, recipe("alpaca-7b")):
        assert fit.plan is None or fit.plan.total < CARDS[fit.card_gb]


def test_the_plan_tells_the_truth_about_a_12_gb_card() -> None:
    text = fits.as_text("LLaMA-7B", LLAMA_7B, recipe("alpaca-7b"))
    assert " 12 GB  full    does not fit" in text
    assert " 12 GB  lora    does not fit" in text
    assert "QLoRA from 6." in text
    assert "on, nothing else." in text
    assert "never the model" in text
    assert fits.least(LLAMA_7B, "qlora", recipe(None, "qlora")).total < 8 * 2**30


def test_what_a_12_gb_card_trains_is_what_the_table_says() -> None:
    small = Shape(30, 576, 1536, 9, 3, 64, 49152, tied=True)
    text = fits.as_text("SmolLM2-135M", small, recipe(None, "full"))
    assert " 12 GB  full    does not fit" not in text
    assert all(f"{name} from 1." in text or f"{name} from 2." in text for name in ("full", "LoRA", "QLoRA"))
    assert "nothing else" not in text
    assert "holds the weights, also whole in fp32: 0.5 GB" in text
    assert "the model too: 0.1 GB in 4 bit" in text
    large = Shape(80, 8192, 28672, 64, 8, 128, 128256)
    assert "Training: nothing fits." in fits.as_text("70B", large, recipe("alpaca-7b"))


def test_a_plan_tells_what_tensors_take_from_what_the_card_must_hold() -> None:
    plan = predict(LLAMA_7B, "qlora", tokens=2048, checkpointed_layers=32, compiled=False)
    assert plan.total - plan.allocated == CONTEXT
    # bitsandbytes' NF4 with double quantisation: 4 bits, an 8-bit scale for 64 numbers, a 32-bit one for 256 scales.
    four_bit = plan.parts["weights"] - 2 * (LLAMA_7B.parameters - LLAMA_7B.linear_parameters)
    assert four_bit / LLAMA_7B.linear_parameters == pytest.approx(0.5 + 1 / 64 + 4 / (64 * 256))


def test_qlora_of_a_7b_trains_on_8_gib() -> None:
    plan = choose(LLAMA_7B, "qlora", 8 * 2**30, step_tokens=18000, longest=512, compiled=False)
    assert plan is not None
    assert plan.total <= 8 * 2**30
