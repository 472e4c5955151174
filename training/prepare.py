"""From settings to what the loop needs: a checked configuration, a tokenizer and packed blocks."""

from accelerate import Accelerator
from datasets import Dataset
from transformers import AutoConfig, PreTrainedTokenizerBase

from ..configuration import DataSettings, ModelSettings, MoEConfig, TrainingSettings
from ..data import load_tokenizer, pack_documents, read_documents, sample_texts, train_tokenizer
from .run_directory import RunDirectory


def read_config(settings: ModelSettings) -> MoEConfig:
    """The preset's configuration with its overrides.

    Raises:
        ValueError: the preset is no MoE configuration of ours, or an override names a field that does not exist.
        huggingface_hub.errors.StrictDataclassError: a value is impossible; the message names the field.
    """
    try:
        config = AutoConfig.from_pretrained(settings.preset)
    except OSError as error:
        raise ValueError(f"preset must be a folder with a config.json; got {settings.preset}") from error
    if not isinstance(config, MoEConfig):
        raise ValueError(
            f"preset must hold a configuration of model type {MoEConfig.model_type}; got {config.model_type}"
        )
    values, overrides = config.to_dict(), settings.overrides()
    for name in overrides:
        if name not in values:
            raise ValueError(f"config_overrides must name fields of MoEConfig; got {name}")
    try:
        return MoEConfig.from_dict(values | overrides)
    except KeyError as error:  # Transformers' own word for a RoPE type without the parameters it needs
        raise ValueError(f"config_overrides must give every parameter that is needed: {error.args[0]}") from error


def prepare_blocks(
    accelerator: Accelerator,
    run: RunDirectory,
    config: MoEConfig,
    data: DataSettings,
    training: TrainingSettings,
) -> tuple[Dataset, PreTrainedTokenizerBase, list[str]]:
    """Read, tokenize and pack the training text; keep the held-out documents and the tokenizer in the run directory.

    The main process does the work first; the others then find it in the cache.

    Returns:
        The packed blocks, the tokenizer, and the domains' names in the order of the blocks' `domain` column.

    Raises:
        ValueError: the text cannot be read (see `read_documents`), or the tokenizer is larger than the vocabulary.
    """
    if data.block_size > config.max_position_embeddings:
        raise ValueError(
            f"block_size must be at most max_position_embeddings ({config.max_position_embeddings}); "
            f"got {data.block_size}"
        )
    assert data.data is not None
    tokenizer_folder = run.preparation / "tokenizer"
    with accelerator.main_process_first():
        documents = read_documents(
            data.data,
            text_column=data.text_column,
            domain_column=data.domain_column,
            validation_fraction=data.validation_fraction,
            max_train_bytes_per_domain=data.max_train_bytes_per_domain,
            max_validation_bytes_per_domain=data.max_validation_bytes_per_domain,
        )
        if accelerator.is_main_process:
            documents["validation"].to_parquet(run.preparation / "validation.parquet")
            if data.tokenizer is None:
                tokenizer = train_tokenizer(sample_texts(documents["train"]), config.vocab_size)
            else:
                tokenizer = load_tokenizer(data.tokenizer)
            tokenizer.save_pretrained(tokenizer_folder)
        # Every process reads what was saved: one tokenizer, and one key for the cache of packed blocks.
        tokenizer = load_tokenizer(tokenizer_folder)
        if len(tokenizer) > config.vocab_size:
            raise ValueError(
                f"vocab_size must hold the tokenizer's {len(tokenizer)} tokens ({data.tokenizer}); "
                f"got {config.vocab_size}"
            )
        domains = sorted(documents["train"].unique("domain"))
        blocks = pack_documents(documents["train"], tokenizer, data.block_size, domains=domains, seed=training.seed)
    return blocks.with_format("torch"), tokenizer, domains
