"""A Hugging Face folder as a model to evaluate, dense or with triangle and block-sparse layers."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from trianglemix.custom_ops.block_sparse.contract import BlockRule
from trianglemix.custom_ops.errors import ConfigurationError, first_words
from trianglemix.custom_ops.triangle.contract import TrianglePattern
from trianglemix.evaluation.model import Answer, reset_peak_memory
from trianglemix.exporter.layers.plan import Fingerprint
from trianglemix.hf.weight_files import check_loaded, check_weight_files
from trianglemix.runtime.errors import MissingPackageError
from trianglemix.runtime.memory import peak_resident_bytes
from trianglemix.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from trianglemix.pytorch.block_choice import BlockChooser

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HuggingFaceOptions:
    """Device, float type and layers by role (none = the model's own dense attention)."""

    device: str = "cpu"
    dtype: str = "auto"
    triangle_layers: Sequence[int] = ()
    pattern: TrianglePattern = field(default_factory=TrianglePattern)
    block_sparse_layers: Sequence[int] = ()
    rule: BlockRule = field(default_factory=BlockRule)


class HuggingFaceModel:
    """A causal language model of transformers, in PyTorch."""

    def __init__(
        self, folder: Path, options: HuggingFaceOptions, beside: HuggingFaceModel | None = None
    ) -> None:
        """Loads the folder; `beside` another model of the same folder it shares that one's weights.

        Raises:
            ConfigurationError: there is no tokenizer, or the layers do not fit.
            MissingPackageError: torch or transformers is not installed.
            WeightsError: the weights are not whole, or not those of the configuration.
        """
        tokenizer = Tokenizer.from_folder(folder)
        if tokenizer is None:
            raise ConfigurationError(f"{folder} has no tokenizer.json, which the tasks need")
        require_torch()
        self._counted = reset_peak_memory()
        self.tokenizer = tokenizer
        self.chooser: BlockChooser | None = None
        """What chooses the blocks of block-sparse layers in the rule's place, if anything does."""
        self._options = options
        self.model: Any = twin(beside.model) if beside else load_causal_model(folder, options.dtype)
        to_device(self.model, options.device)
        if options.device.startswith("cuda"):
            import torch

            torch.cuda.reset_peak_memory_stats()
        self.use_layers(options.triangle_layers, options.block_sparse_layers)

    def use_layers(self, layers: Sequence[int], blocks: Sequence[int] = ()) -> None:
        """Makes these the triangle and block-sparse layers (none = the model's own attention)."""
        from trianglemix.pytorch import TriangleMixConfig, patch, unpatch
        from trianglemix.pytorch.kept_shares import KeptShares

        self._layers, self._blocks, self._kept = tuple(layers), tuple(blocks), KeptShares()
        if layers or blocks:
            config = replace(
                TriangleMixConfig.from_pattern(self._options.pattern, layers),
                block_sparse_layer_indices=blocks,
                block_rule=self._options.rule,
            )
            patch(self.model, config)
        elif getattr(self.model.config.get_text_config(), "trianglemix", None) is not None:
            unpatch(self.model)

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""
        return int(self.model.config.get_text_config().num_hidden_layers)

    @property
    def facts(self) -> Mapping[str, Any]:
        """Kind, layers, pattern, rule, what it kept of the prompts so far, device, float type."""
        kept = self._kept.by_layer()
        return {
            "kind": "PyTorch",
            "triangle_layers": list(self._layers),
            "block_sparse_layers": list(self._blocks),
            "layers": self.num_layers,
            "pattern": asdict(self._options.pattern) if self._layers else None,
            "rule": asdict(self._options.rule) if self._blocks else None,
            "density": fmean(kept.values()) if kept else None,
            "device": self._options.device,
            "dtype": str(self.model.dtype),
        }

    def answer(self, ids: tuple[int, ...], max_new_tokens: int) -> Answer:
        """Greedy, one prompt; the first token's logits are the only ones of the prefill."""
        new, ttft = self.greedy_tokens(ids, max_new_tokens)
        return Answer(self.tokenizer.decode(new), len(ids), ttft)

    def greedy_tokens(self, ids: tuple[int, ...], max_new_tokens: int) -> tuple[list[int], float]:
        """The answer's tokens, its stop token left out, and seconds to the first one."""
        import torch
        from trianglemix.pytorch import prompt_length

        started = time.perf_counter()
        new: list[int] = []
        stops = self.stop_ids
        with torch.inference_mode(), prompt_length(len(ids)), self._kept.watching(self.chooser):
            token, cache = self._step(torch.tensor([ids]), None)
            ttft = time.perf_counter() - started
            while token not in stops:
                new.append(token)
                if len(new) == max_new_tokens:
                    break
                token, cache = self._step(torch.tensor([[token]]), cache)
        return new, ttft

    def _step(self, ids: Tensor, cache: Any) -> tuple[int, Any]:
        output = self.model(
            ids.to(self.model.device), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        return int(output.logits[0, -1].argmax()), output.past_key_values

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        stop = self.model.generation_config.eos_token_id
        return frozenset([stop] if isinstance(stop, int) else stop or ())

    def peak_memory_mb(self) -> float | None:
        """Peak memory since loading: the GPU's on CUDA, else the process's resident set."""
        if self._options.device.startswith("cuda"):
            import torch

            return torch.cuda.max_memory_allocated() / 2**20
        return peak_resident_bytes() / 2**20 if self._counted else None


def load_causal_model(folder: Path, dtype: Any) -> Any:
    """The folder's model in transformers, every weight of it from the folder.

    Raises:
        WeightsError: the weights are not whole, or not those of the configuration.
    """
    from transformers import AutoModelForCausalLM

    check_weight_files(folder)
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
    for warning in check_loaded(folder, model, found):
        logger.warning("%s", warning)
    return model


def twin(model: Any) -> Any:
    """A dense model of its own, to be patched for itself, with the weights of the other."""
    from trianglemix.pytorch import unpatch

    shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
    made = copy.deepcopy(model, shared)
    if getattr(made.config.get_text_config(), "trianglemix", None) is not None:
        unpatch(made)
    return made


def require_torch() -> None:
    """Raises MissingPackageError where Hugging Face folders cannot run, for want of a package."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            f"a Hugging Face folder runs in torch and transformers, but one of them cannot be "
            f"imported ({error}); pip install 'trianglemix[hf]'"
        ) from error


def to_device(model: Any, device: str) -> None:
    """Moves a torch model to the device, to answer there.

    Raises:
        ConfigurationError: torch has no such device here, or the model does not fit it.
    """
    try:
        model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        first = (str(error).splitlines() or [repr(error)])[0]
        raise ConfigurationError(
            f"the model cannot go to the device {device!r}: {first}"
        ) from error


def fingerprint_of(config: Any) -> Fingerprint:
    """The shape that a plan is bound to, from a transformers configuration."""
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    kv_heads = getattr(text, "num_key_value_heads", None)
    head_size = getattr(text, "head_dim", None)
    return Fingerprint(
        num_layers=int(text.num_hidden_layers),
        num_heads=heads,
        kv_num_heads=int(kv_heads or heads),
        head_size=int(head_size or text.hidden_size // heads),
        hidden_size=int(text.hidden_size),
        vocabulary_size=int(text.vocab_size),
    )


def shape_of_folder(folder: Path) -> Fingerprint:
    """The shape of the folder's model, from its config.json.

    Raises:
        ConfigurationError: the folder holds no model that transformers knows.
        MissingPackageError: torch or transformers is not installed.
    """
    if not (folder / "config.json").is_file():  # else transformers looks for it in the network
        raise ConfigurationError(f"{folder} has no config.json; give a Hugging Face model folder")
    require_torch()
    from transformers import AutoConfig

    try:
        return fingerprint_of(AutoConfig.from_pretrained(folder))
    except Exception as error:  # transformers checks with errors of its packages' own
        raise ConfigurationError(
            f"{folder} is no Hugging Face model folder: {first_words(error)}"
        ) from error
