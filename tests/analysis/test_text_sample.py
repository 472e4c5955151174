"""The texts of the token view: every character once, and the experts that the model alone selects."""

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from equipoise import MoEForCausalLM
from equipoise.analysis.routing_trace import trace_windows
from equipoise.analysis.text_sample import TextSample, token_name, token_pieces, visible
from equipoise.data import evaluation_windows, train_tokenizer

BYTES = train_tokenizer(["ab"], vocab_size=257)
MERGED = train_tokenizer(["the law of the land, où 数は三である🙂 " * 4], vocab_size=330)


@given(st.text(min_size=1, max_size=30), st.sampled_from([BYTES, MERGED]), st.data())
def test_pieces_join_to_the_text_wherever_it_is_cut(text: str, tokenizer: PreTrainedTokenizerBase, data) -> None:
    tokens = len(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
    pieces = token_pieces(tokenizer, text, 0, tokens + 1)
    assert len(pieces) == tokens + 1
    assert pieces[0] == "<|endoftext|>"
    assert "".join(pieces[1:]) == visible(text)
    # A window from anywhere on shows the same pieces, but for a character that is cut where it begins.
    start = data.draw(st.integers(1, tokens))
    later = token_pieces(tokenizer, text, start, tokens + 1 - start)
    assert len(later) == tokens + 1 - start
    assert visible(text).endswith("".join(later))
    assert later[1:] == pieces[start + 1 :]


def test_a_character_of_several_tokens_stands_with_the_first() -> None:
    assert token_pieces(BYTES, "a🙂é", 0, 8) == ["<|endoftext|>", "a", "🙂", "", "", "", "é", ""]


def test_the_name_of_a_special_token_in_a_text_is_text() -> None:
    assert "".join(token_pieces(BYTES, "<|endoftext|>", 1, 13)) == "<|endoftext|>"


def test_what_cannot_be_seen_is_written_out() -> None:
    assert visible("a\x00b\u202ec\ud7ff\u00a0\n\t") == "a\\x00b\\u202ec\\ud7ff\u00a0↵\n\t"
    byte = BYTES.encode("é")
    assert [token_name(BYTES, token) for token in byte] == ["0xC3", "0xA9"]
    assert token_name(MERGED, MERGED.encode(" the")[0]) == "␣the"
    assert token_name(BYTES, BYTES.encode("\n")[0]) == "↵"


@torch.no_grad()
def test_experts_are_those_that_the_model_selects_and_the_text_is_chosen_without_it(
    model: MoEForCausalLM, tokenizer: PreTrainedTokenizerBase, documents: Dataset
) -> None:
    windows = evaluation_windows(documents, tokenizer, 24)
    sample = TextSample(windows, num_tokens=16, layers=[1])
    rows = dict(sample.rows)
    trace_windows(model, windows, batch_size=5, observers=[sample])
    texts = sample.texts(documents, tokenizer)
    assert [text.domain for text in texts] == ["code", "ja", "law"]
    for text in texts:
        window = windows[rows[text.domain]]
        assert window["domain"] == text.domain
        number = len(text.pieces)
        assert number == min(16, len(window["input_ids"]))
        output = model(input_ids=torch.tensor([window["input_ids"]]), output_router_logits=True)
        selected = output.selected_experts[1][:number]
        chosen = output.router_logits[1].softmax(-1)[:number].gather(-1, selected)
        chosen = chosen / chosen.sum(-1, keepdim=True)
        for token in range(number):
            expected = sorted(zip(chosen[token].tolist(), selected[token].tolist(), strict=True), reverse=True)
            assert text.experts[token, 0].tolist() == [expert for _, expert in expected]
            weights = [weight * 255 for weight, _ in expected]
            assert text.weights[token, 0].tolist() == pytest.approx(weights, abs=0.51)
        # The pieces are those of this window's tokens, found by decoding them together.
        shown = "".join(text.pieces).replace("↵\n", "\n")
        decoded = tokenizer.decode(window["input_ids"][:number])
        assert shown == decoded or decoded.strip("\ufffd") in shown


def test_a_later_window_of_a_document_shows_its_own_text(tokenizer: PreTrainedTokenizerBase) -> None:
    documents = Dataset.from_list([{"text": "".join(f"{n:03d};" for n in range(60)), "domain": "x"}])
    windows = evaluation_windows(documents, BYTES, 20)
    sample = TextSample(windows, num_tokens=20, layers=[])
    row = sample.rows["x"]
    assert row > 0
    before = sample._tokens_before(row)
    pieces = token_pieces(BYTES, documents[0]["text"], before, len(windows[row]["input_ids"]))
    assert "".join(pieces) == BYTES.decode(windows[row]["input_ids"])
