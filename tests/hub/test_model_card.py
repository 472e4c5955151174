"""The model card of real and of hostile runs: what it says is so, and what it does not know it leaves out."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from training_runs import ARCHITECTURE

from equipoise import MoEConfig, MoEForCausalLM
from equipoise.configuration import model_size
from equipoise.hub.model_card import _balancing_fields, count_parameters, write_model_card
from equipoise.modeling import MoEForSequenceClassification

MEASURED = ("evaluation.json", "analysis/analysis.json")


def card_of(folder: Path, model: Path, **arguments: Any) -> str:
    """The card of a model, written into a copy of its folder."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    write_model_card(folder, **{"name": "user/mine"} | arguments)
    return (folder / "README.md").read_text(encoding="utf-8")


def body(card: str) -> str:
    """The card without its metadata."""
    return card.split("\n---\n", 1)[1]


def tables(card: str) -> list[list[list[str]]]:
    """What a Markdown reader sees in the card's tables: table, row, cell; only text in any of them."""
    found: list[list[list[str]]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(body(card)):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and token.level == 4 and found:
            assert {child.type for child in token.children} <= {"text", "text_special"}, token.content
            found[-1][-1].append("".join(child.content for child in token.children))
    return found


def table(card: str, *header: str) -> list[list[str]]:
    """The rows of the one table whose header begins so."""
    (found,) = [rows for rows in tables(card) if rows[0][: len(header)] == list(header)]
    return found[1:]


def copy_of(run: Path, folder: Path) -> Path:
    """A copy of a run directory, evaluated and analysed where it lies now."""
    copy = shutil.copytree(run, folder / "run", ignore=shutil.ignore_patterns("checkpoints", ".lock"))
    for name in MEASURED:
        edit(copy / name, lambda record: record["settings"].update(measured_of(copy)))
    return copy


def measured_of(run: Path) -> dict[str, str]:
    """What an evaluation or an analysis records of the model and the documents, if they are a run's own."""
    return {"model": str(run / "model"), "data": str(run / "validation.parquet")}


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))


@pytest.fixture(scope="module")
def card(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("card")
    return card_of(folder, finished_run / "model", run=finished_run, license="apache-2.0", languages=["en"])


def test_metadata_is_read_back_as_it_was_meant(card: str, finished_run: Path) -> None:
    read = ModelCard(card)
    assert read.content == card  # nothing is lost by reading and writing it
    data = read.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "apache-2.0")
    assert (data.language, data.model_name, data.datasets) == (["en"], "mine", None)
    assert "mixture-of-experts" in data.tags
    recorded = json.loads((finished_run / "evaluation.json").read_text())["domains"]
    measured = {(result.dataset_config, result.metric_type): result.metric_value for result in data.eval_results}
    assert measured == {
        (domain, metric): recorded[domain][metric] for domain in recorded for metric in ("bits_per_byte", "perplexity")
    }
    assert set(recorded) == {"code", "prose", "all"}


def test_tables_say_what_the_run_recorded(card: str, finished_run: Path) -> None:
    record = {
        name: json.loads((finished_run / name).read_text())
        for name in ("data.json", "training.json", "evaluation.json", "analysis/analysis.json")
    }
    data = {row[0]: row[1:] for row in table(card, "domain", "source")}
    assert set(data) == {"code", "prose"}
    for domain, described in record["data.json"].items():
        source, _, documents, num_bytes, passes, held_out, _ = data[domain]
        assert source == "local files"
        assert (documents, num_bytes) == (f"{described['documents']:,}", f"{described['bytes']:,}")
        assert held_out == str(described["held_out_documents"])
        assert float(passes) == pytest.approx(record["training.json"]["epochs"][domain], abs=0.005)
    assert sum(float(row[1].rstrip("%")) for row in data.values()) == pytest.approx(100, abs=0.2)

    recipe = dict(row for rows in tables(card)[:4] for row in rows if len(row) == 2)
    assert recipe["steps"] == "12"
    assert recipe["tokens"] == f"{12 * 2 * 64:,}"
    assert recipe["global batch"] == "2 blocks of 64 tokens"
    assert recipe["learning rate"].startswith("0.01 after 2 steps of warm-up, cosine")

    layers = record["analysis/analysis.json"]["layers"]
    balance = table(card, "MoE layer", "MaxVio, held-out text")
    assert len(balance) == len(layers) == ARCHITECTURE["num_hidden_layers"]
    for index, (row, layer) in enumerate(zip(balance, layers, strict=True)):
        expected = [
            layer["max_vio_global"],
            record["training.json"]["max_vio_batch"][index],
            record["training.json"]["max_vio_micro"][index],
            layer["dead_experts"],
            layer["load_entropy"],
        ]
        assert [float(cell) for cell in row] == pytest.approx([index, *expected], abs=5e-4)
    for row, layer in zip(table(card, "MoE layer", "bits"), layers, strict=False):
        expected = [layer["mutual_information_bits"], layer["null_mean_bits"], layer["null_quantile_95_bits"]]
        assert [float(cell) for cell in row[1:4]] == pytest.approx(expected, abs=5e-4)
    for domain, bits, perplexity, *_ in table(card, "domain", "bits per byte"):
        result = record["evaluation.json"]["domains"][domain]
        assert float(bits) == pytest.approx(result["bits_per_byte"], abs=5e-5)
        assert float(perplexity.replace(",", "")) == pytest.approx(result["perplexity"], abs=5e-3)


def test_balancing_is_what_the_configuration_says_and_only_what_acts(card: str, tmp_path: Path) -> None:
    (settings,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    read = yaml.safe_load(settings)
    assert read == {
        "balancing_mode": "loss_free",
        "balanced_positions": "tokens",
        "bias_update_rule": "sign",
        "bias_update_rate": 0.001,  # where none is set, the rule's own
        "bias_update_rate_decay": 1.0,
    }


OF_LOSS = {"balancing_mode", "router_aux_loss_coef", "balanced_positions"}
OF_BIAS = {"balancing_mode", "balanced_positions", "bias_update_rule", "bias_update_rate", "bias_update_rate_decay"}


@pytest.mark.parametrize(
    ("fields", "acting"),
    [
        ({"balancing_mode": "none"}, {"balancing_mode"}),
        (
            {"balancing_mode": "none", "router_z_loss_coef": 0.1},
            {*OF_LOSS, "router_z_loss_coef"} - {"router_aux_loss_coef"},
        ),
        ({"balancing_mode": "sequence"}, OF_LOSS),
        ({"balancing_mode": "global_batch"}, {*OF_LOSS, "load_estimate"}),
        (
            {"balancing_mode": "global_batch", "complementary_balancing_mode": "sequence"},
            {*OF_LOSS, "load_estimate", "complementary_balancing_mode", "complementary_aux_loss_coef"},
        ),
        ({"balancing_mode": "loss_free", "bias_update_rule": "quantile"}, OF_BIAS),
        (
            {"balancing_mode": "loss_free", "bias_update_rule": "tanh_momentum"},
            {*OF_BIAS, "bias_update_kappa", "bias_update_momentum"},
        ),
        (
            {"balancing_mode": "none", "balancing_schedule": [{"step": 3, "balancing_mode": "loss_free"}]},
            {*OF_BIAS, "balancing_schedule"},
        ),
    ],
)
def test_balancing_shows_the_fields_that_act(
    tiny_config: Callable[..., MoEConfig], fields: dict[str, Any], acting: set[str]
) -> None:
    config = tiny_config(**fields)
    shown = _balancing_fields(config)
    assert set(shown) == acting
    rates = {"sign": 0.001, "tanh_momentum": 0.001, "quantile": 0.2}
    for name, value in shown.items():
        assert value == (rates[config.bias_update_rule] if name == "bias_update_rate" else getattr(config, name))


def test_p_is_what_the_card_says_it_is(card: str) -> None:
    said = "`p` is\n(1 + how many of these reach what was measured) / (1 + 20)."
    assert said in card
    for row in table(card, "MoE layer", "bits"):
        reached = float(row[4]) * 21 - 1
        assert reached == pytest.approx(round(reached), abs=21 * 5e-5)
        assert 0 <= round(reached) <= 20
    values = [float(row[4]) for row in table(card, "MoE layer", "bits")]
    assert all(value >= 1 / 21 - 5e-5 for value in values)


@pytest.mark.parametrize(
    ("dense", "said"),
    [(0, "in each layer."), (1, "in each of the last 2 layers."), (2, "in the last layer.")],
)
def test_the_summary_counts_the_layers_that_have_experts(
    tiny_config: Callable[..., MoEConfig], tmp_path: Path, dense: int, said: str
) -> None:
    MoEForCausalLM(tiny_config(first_k_dense_replace=dense)).save_pretrained(tmp_path)
    write_model_card(tmp_path, name="user/mine")
    assert f": 2 of 8 experts {said}" in (tmp_path / "README.md").read_text()


def test_pictures_lie_where_the_card_shows_them(finished_run: Path, tmp_path: Path) -> None:
    card = card_of(tmp_path, finished_run / "model", run=finished_run)
    shown = re.findall(r"!\[.*?\]\((.*?)\)", card)
    assert shown == ["analysis/training.png", "analysis/load.png", "analysis/specialisation.png"]
    for picture in shown:
        assert (tmp_path / picture).read_bytes() == (finished_run / picture).read_bytes()


def test_its_first_lines_of_code_run(
    card: str, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(finished_run / "model", tmp_path / "user" / "mine")
    monkeypatch.chdir(tmp_path)
    first, _ = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(first, names)
    assert isinstance(names["model"], MoEForCausalLM)
    assert capsys.readouterr().out.startswith("Once")


def test_no_path_of_this_machine_is_told(card: str, finished_run: Path, tmp_path: Path) -> None:
    """Guards against publishing folder names, and user names in them, with `data.json` and `settings.yaml`."""
    assert str(finished_run.parents[1]) not in card
    run = copy_of(finished_run, tmp_path)
    sources = [{"files": ["/home/someone/secret/*.jsonl"]}, {"data": "/home/someone/secret"}]
    data = json.loads((run / "data.json").read_text())
    for domain, source in zip(data.values(), sources, strict=True):
        domain["source"] = source
    (run / "data.json").write_text(json.dumps(data))
    assert "secret" not in card_of(tmp_path / "card", run / "model", run=run)


def test_data_sets_of_the_hub_are_named_and_weights_are_shares(finished_run: Path, tmp_path: Path) -> None:
    run = copy_of(finished_run, tmp_path)
    web = {"hub": "org/web", "config": "de", "streaming": True, "data_files": ["a/*.parquet", "b_*.parquet"]}
    data = {
        "web": {"source": web, "key": "0", "weight": 3.0},  # a stream: nobody knows how much there is
        "more": {"source": {"hub": "org/web", "revision": "abc"}, "key": "1", "weight": 0.5, "documents": 7},
        "proofs": {"source": {"package": "metamath"}, "key": "2", "weight": 0.5, "documents": 5, "bytes": 1234567},
    }
    (run / "data.json").write_text(json.dumps(data))
    card = card_of(tmp_path / "card", run / "model", run=run)
    assert ModelCard(card).data.datasets == ["org/web"]
    rows = {row[0]: row[1:] for row in table(card, "domain", "source", "share of the blocks drawn")}
    assert rows["web"][:4] == ["org/web (Hub), config de, files a/*.parquet, b_*.parquet", "75.0%", "", ""]
    assert rows["more"][:4] == ["org/web (Hub), revision abc", "12.5%", "7", ""]
    assert rows["proofs"][0].startswith("metamath of ")
    assert rows["proofs"][1:4] == ["12.5%", "5", "1,234,567"]


def test_what_is_missing_is_left_out_and_said(finished_run: Path, tmp_path: Path) -> None:
    run = copy_of(finished_run, tmp_path)
    shutil.rmtree(run / "analysis")
    shutil.copytree(run / "model", tmp_path / "card")
    missing = write_model_card(tmp_path / "card", name="user/mine", run=run)
    card = (tmp_path / "card" / "README.md").read_text()
    assert "## Specialisation" not in card
    assert "![" not in card
    assert "## Evaluation" in card
    assert [row[0] for row in tables(card)[-2]] == ["MoE layer", "0", "1"]  # balance at the end of training alone
    assert len(missing) == 3  # analysis, licence, languages
    assert all(line in card for line in missing)
    assert any("scripts/analyze.py" in line for line in missing)
    assert "No licence was given" in card
    assert ModelCard(card).data.license is None

    (run / "evaluation.json").unlink()
    (run / "training.json").unlink()
    card = card_of(tmp_path / "card", run / "model", run=run)
    assert "## Evaluation" not in card
    assert "## Training\n" not in card
    assert "scripts/evaluate_model.py" in card
    assert ModelCard(card).data.eval_results is None

    alone = card_of(tmp_path / "card", run / "model")
    assert "## Training data" not in alone
    assert "not recorded" in alone
    assert "For training from here, by its configuration: No balancing loss: a bias" in alone
    whole = card_of(tmp_path / "whole", run / "model", run=finished_run)
    assert "\nNo balancing loss: a bias" in whole


@pytest.mark.parametrize("other", ["data", "model", "run"])
def test_what_is_said_of_held_out_text_was_measured_on_it(finished_run: Path, tmp_path: Path, other: str) -> None:
    """`--data TRAINING_TEXT` of evaluate_model or analyze, or another model, must not be told as of the run."""
    run = copy_of(finished_run, tmp_path)
    changes = {
        "data": {"data": "training.jsonl"},
        "model": {"model": str(run / "checkpoints" / "step-00000006" / "model")},
        "run": measured_of(finished_run),
    }
    for name in MEASURED:
        edit(run / name, lambda record: record["settings"].update(changes[other]))
    card = card_of(tmp_path / "card", run / "model", run=run)
    assert "## Evaluation" not in card
    assert "## Specialisation" not in card
    assert "![" not in card
    assert "held-out text: `analysis/` is of another model or other documents than those of the run" in card
    assert "- The held-out documents come from" not in card
    assert "`evaluation.json` is of another model or other documents than those of the run" in card
    assert ModelCard(card).data.eval_results is None


def test_a_run_that_was_moved_keeps_what_was_measured(finished_run: Path, tmp_path: Path) -> None:
    """And one that was evaluated together with another, on the same documents."""
    run = copy_of(finished_run, tmp_path).rename(tmp_path / "moved")
    moved = card_of(tmp_path / "card", run / "model", run=run)
    assert "## Evaluation" in moved
    assert "## Specialisation" in moved
    together = measured_of(run) | {"data": measured_of(finished_run)["data"]}
    edit(run / "evaluation.json", lambda record: record["settings"].update(together))
    assert "## Evaluation" in card_of(tmp_path / "card", run / "model", run=run)
    (run / "validation.parquet").write_bytes(b"other documents")
    assert "## Evaluation" not in card_of(tmp_path / "card", run / "model", run=run)


def test_records_of_another_model_are_refused(finished_run: Path, tmp_path: Path) -> None:
    run = copy_of(finished_run, tmp_path)
    analysis = json.loads((run / "analysis" / "analysis.json").read_text())
    analysis["layers"].pop()
    (run / "analysis" / "analysis.json").write_text(json.dumps(analysis))
    with pytest.raises(ValueError, match=r"analysis/analysis.json must be of this model, with 2 MoE layers; got 1"):
        write_model_card(run / "model", name="user/mine", run=run)
    (run / "analysis" / "analysis.json").write_text("{")
    with pytest.raises(ValueError, match=r"analysis.json must hold JSON"):
        write_model_card(run / "model", name="user/mine", run=run)


def test_a_head_is_loaded_by_its_own_auto_class(tiny_config: Callable[..., MoEConfig], tmp_path: Path) -> None:
    MoEForSequenceClassification(tiny_config(num_labels=3)).save_pretrained(tmp_path)
    write_model_card(tmp_path, name="user/mine")
    card = (tmp_path / "README.md").read_text()
    assert ModelCard(card).data.pipeline_tag == "text-classification"
    assert "AutoModelForSequenceClassification.from_pretrained" in card
    assert "AutoTokenizer" not in card  # there is none
    assert "generate(" not in card


@hypothesis_settings(max_examples=12)
@given(
    num_experts=st.sampled_from([4, 6, 9]),
    num_experts_per_tok=st.integers(1, 4),
    num_shared_experts=st.integers(0, 2),
    first_k_dense_replace=st.integers(0, 3),
    attention_bias=st.booleans(),
    tie_word_embeddings=st.booleans(),
    sharded=st.booleans(),
)
def test_parameters_are_counted_exactly(
    tiny_config: Callable[..., MoEConfig],
    tmp_path_factory: pytest.TempPathFactory,
    sharded: bool,
    **fields: Any,
) -> None:
    config = tiny_config(**fields)
    model = MoEForCausalLM(config).bfloat16()
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder, max_shard_size="20KB" if sharded else "1GB")
    assert (len(list(folder.glob("*.safetensors"))) > 1) == sharded
    counted = count_parameters(folder, config)
    assert counted.total == sum(parameter.numel() for parameter in model.parameters())
    assert counted.active == model_size(config).active  # by arithmetic on the configuration
    assert counted.dtypes == ("bfloat16",)


def shown(text: str) -> str:
    """How a cell must show a text: its characters, those that cannot be seen written out, without the ends' blanks."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text).strip()


pieces = [
    "|",
    "\\",
    "`x`",
    "*x*",
    "__x__",
    "~~x~~",
    "[x](y)",
    "![x](y)",
    "<b>x</b>",
    "<!--",
    "&amp;",
    "$$x$$",
    "{{ 7 * 7 }}",
]
pieces += ["{% raw %}", "\n\n# x", "\r---\n", "\t", "\u2028", "\u202e", "\x00", "- ", "1. ", ": ", "é🙂"]
names = st.lists(st.one_of(st.sampled_from(pieces), st.characters()), max_size=6).map("".join)


@hypothesis_settings(max_examples=30)
@given(first=names, second=names, source=names)
@example(first="".join(pieces[:12]), second="".join(pieces[12:]), source="".join(reversed(pieces)))
def test_hostile_names_stay_text(
    finished_run: Path, tmp_path_factory: pytest.TempPathFactory, first: str, second: str, source: str
) -> None:
    """Domains come from a column of the data: a name may hold pipes, line breaks, HTML, formulas or template code."""
    first, second = f"{first}1", f"{second}2"
    folder = tmp_path_factory.mktemp("hostile")
    run = folder / "run"
    (run / "analysis").mkdir(parents=True)
    measured = json.loads((finished_run / "evaluation.json").read_text())
    measured["domains"] = {
        name: measured["domains"][domain] for name, domain in ((first, "code"), (second, "prose"), ("all", "all"))
    }
    measured["settings"] |= measured_of(run)
    (run / "evaluation.json").write_text(json.dumps(measured))
    data = {
        name: {"source": {"hub": "a/b", "config": source}, "key": "0", "weight": None, "documents": 1, "bytes": 10}
        for name in (first, second)
    }
    (run / "data.json").write_text(json.dumps(data))
    (folder / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / "model" / name).symlink_to(finished_run / "model" / name)
    write_model_card(folder / "model", name="user/mine", run=run)
    card = (folder / "model" / "README.md").read_bytes().decode("utf-8")

    rows = table(card, "domain", "source")
    assert [row[0] for row in rows] == [shown(first), shown(second)]
    assert {len(row) for row in rows} == {8}
    assert all(row[1] == shown(f"a/b (Hub), config {source}") for row in rows)
    assert [row[0] for row in table(card, "domain", "bits per byte")] == [shown(first), shown(second), "all"]
    headings = [line for line in body(card).splitlines() if line.startswith("#")]
    assert headings == ["# mine", *(f"## {title}" for title in (
        "The model", "Load it", "Training data", "Balancing", "Evaluation", "Limitations", "Not in this card"
    ))]  # fmt: skip
    results = ModelCard(card).data.eval_results
    assert [result.metric_value for result in results] == [
        value[metric] for value in measured["domains"].values() for metric in ("bits_per_byte", "perplexity")
    ]
    assert all(math.isfinite(result.metric_value) for result in results)
    assert results[0].dataset_config.strip() == shown(first)
