"""Our models under Transformers' own model tests; copied into its `tests` package, and run there.

Its source distribution holds the mixins that every model there is tested with, but not those of generation and export,
nor the small file that starts processes: the first two stand empty here, the third is written out.
"""

import unittest

import torch
from transformers.models.auto import modeling_auto as auto

# As if ours were one of Transformers' own: its tests choose inputs and labels by these names.
auto.MODEL_MAPPING_NAMES["equipoise_moe"] = "MoEModel"
auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["equipoise_moe"] = "MoEForCausalLM"
auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES["equipoise_moe"] = "MoEForQuestionAnswering"
auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["equipoise_moe"] = "MoEForSequenceClassification"
auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES["equipoise_moe"] = "MoEForTokenClassification"

from equipoise import (  # noqa: E402
    MoEConfig,
    MoEForCausalLM,
    MoEForQuestionAnswering,
    MoEForSequenceClassification,
    MoEForTokenClassification,
    MoEModel,
)

from . import test_fsdp_mixin, test_tensor_parallel_mixin  # noqa: E402
from .generation.test_utils import GenerationTesterMixin  # noqa: E402
from .test_configuration_common import ConfigTester  # noqa: E402
from .test_modeling_common import ModelTesterMixin, ids_tensor  # noqa: E402
from .test_training_mixin import TrainingTesterMixin  # noqa: E402

# By default only a few of its own models go through the tests that start processes.
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_tensor_parallel_mixin.EP_DISTRIBUTED_TEST_MODEL_TYPES = None  # there before 5.23
PARALLEL = [test_tensor_parallel_mixin.TensorParallelTesterMixin, test_fsdp_mixin.FSDPTesterMixin]
try:
    from . import test_expert_parallel_mixin
except ImportError:
    pass  # before 5.23 expert parallelism is tested with tensor parallelism
else:
    test_expert_parallel_mixin.EP_DISTRIBUTED_TEST_MODEL_TYPES = None
    PARALLEL.append(test_expert_parallel_mixin.ExpertParallelTesterMixin)


class Tester:
    """What the mixins ask for: a small configuration, inputs, and the classes."""

    base_model_class = MoEModel
    causal_lm_class = MoEForCausalLM
    config_class = MoEConfig
    question_answering_class = MoEForQuestionAnswering
    sequence_classification_class = MoEForSequenceClassification
    token_classification_class = MoEForTokenClassification
    batch_size, seq_length, vocab_size, hidden_size = 4, 7, 99, 32
    num_hidden_layers, num_attention_heads, num_labels, is_training = 2, 4, 3, True

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent

    def get_config(self) -> MoEConfig:
        return MoEConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=48,
            num_hidden_layers=self.num_hidden_layers,
            first_k_dense_replace=1,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2,
            use_qk_norm=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            num_experts=8,
            num_experts_per_tok=2,
            num_shared_experts=1,
            moe_intermediate_size=16,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )

    def prepare_config_and_inputs(self) -> tuple[MoEConfig, dict[str, torch.Tensor]]:
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}

    prepare_config_and_inputs_for_common = prepare_config_and_inputs


class _Models:
    all_model_classes = (
        MoEModel,
        MoEForCausalLM,
        MoEForQuestionAnswering,
        MoEForSequenceClassification,
        MoEForTokenClassification,
    )
    # An expert that no token of so small a batch selects has none.
    test_all_params_have_gradient = False
    pipeline_model_mapping = {"text-generation": MoEForCausalLM}  # noqa: RUF012
    model_tester_class = Tester
    model_tester: Tester | None = None  # abstract in the mixins

    def setUp(self) -> None:
        self.model_tester = Tester(self)


class TestModel(_Models, ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    def test_config(self) -> None:
        ConfigTester(self, config_class=MoEConfig, hidden_size=32, num_attention_heads=4).run_common_tests()


class TestParallel(_Models, *PARALLEL, unittest.TestCase):
    pass
