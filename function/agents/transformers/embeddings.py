"""Texts to vectors, from a folder of sentence-transformers or of a plain encoder of transformers.

The folder says how: `modules.json` with the steps behind the model (see `sentence_modules`), `sentence_bert_config.json` with the length at
which texts are cut, `config_sentence_transformers.json` with prompts. Without `modules.json` it is the mean over the tokens, and the last
token of a causal language model, as the library has it. The vectors are those of its `encode`.
"""

import functools
import logging
from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from function.agent import BadInput, TensorSpec, Weights
from function.agents.inputs import check_no_prompt
from function.agents.transformers import choice, loading
from function.agents.transformers.sentence_modules import SENTENCE, TOKENS, Features, Normalize, Pooling, Step, read_json, read_layout
from function.settings import for_agents
from weights_cache.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("relight.function")

_ENCODERS = {  # of models with a decoder, which is not needed
    "longt5": "LongT5EncoderModel",
    "mt5": "MT5EncoderModel",
    "switch_transformers": "SwitchTransformersEncoderModel",
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
}
_OF_TRANSFORMER = [
    f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
_PARAMETERS = ("prompt", "prompt_name", "dimensions")
_UNBOUNDED = 10**20  # a `model_max_length` beyond it says that there is none
_REMEMBERED = 512  # texts whose tokens are kept between `size` and `predict`
_LONG = 4096  # characters of a text whose tokens are not: they are kept by the whole text, and made once, by `predict`
_CHARACTERS = 4  # about as many of a text make a token
MOST_CHARACTERS = 1 << 20  # of a text with its prompt; the tokenizer reads all of it, and keeps what it cuts off until it is done


class Embeddings:
    """One text in, one vector out. Parameters: `prompt` or `prompt_name`, and `dimensions` of a model that declares Matryoshka vectors."""

    def load(self, weights: Weights, device: str) -> None:
        """Bind the model's tensors and those of the steps behind it, and build the tokenizer. Raises WeightsError, SettingsError."""
        loading.library()
        self._encoder, self._steps = _modules(weights, device)
        self._prompts = Prompts(read_json(weights, "config_sentence_transformers.json") or {})
        config = self._encoder.config
        self._matryoshka: list[int] | None = config.get("matryoshka_dimensions") or ([] if config.get("is_matryoshka") else None)
        self._is_unit = any(isinstance(step, Normalize) for step in self._steps[-1:])
        self._tokens_of = functools.lru_cache(_REMEMBERED)(self._encoder.tokens)
        self.width = len(self._embed(["a"], None, 0)[0])
        self.abilities = ["tokens"] + ["dimensions"] * (self._matryoshka is not None)
        self.outputs = [TensorSpec("output", "FP32", (-1, -1 if self._matryoshka is not None else self.width))]

    def warm_up(self) -> None:
        """The first pass sets up torch's kernels."""
        self.predict(["warm up"], {})

    def predict(self, inputs: Sequence[Any], parameters: Mapping[str, Any]) -> Sequence[Any]:
        """A vector of float32, as one of numpy's arrays, for each text."""
        check_no_prompt(inputs, "embeddings")
        for text in inputs:
            if not isinstance(text, str):
                raise BadInput(f"each instance must be a text (a string), not {type(text).__name__}")
        if unknown := [name for name in parameters if name not in _PARAMETERS]:
            raise BadInput(f"there is no parameter {unknown[0]!r:.100}; this model takes {', '.join(_PARAMETERS)}")
        return list(self._embed(inputs, self._prompts.find(parameters), self._dimensions(parameters.get("dimensions"))).numpy())

    def size(self, input: Any) -> int:  # noqa: A002  the contract's word
        """Tokens, as many as the model sees of a text."""
        if not isinstance(input, str):
            return 0
        text = (self._prompts.default or "") + input
        if len(text) > _LONG:
            return min(len(text) // _CHARACTERS, self._encoder.limit)
        return len(self._tokens_of(text)[0])

    def _embed(self, texts: Sequence[str], prompt: str | None, dimensions: int) -> "Tensor":
        """dimensions: at which vectors are cut; 0: the model's own."""
        import torch

        with torch.inference_mode():
            rows = [self._row((prompt or "") + text) for text in texts]
            features = self._encoder.run(rows)
            if prompt and any(isinstance(step, Pooling) and not step.includes_prompt for step in self._steps):
                features.prompt_tokens = self._encoder.prompt_tokens(prompt)
            for step in self._steps:
                step(features)
            vectors = features.named[SENTENCE].float()
            size = dimensions or self._prompts.truncate_to
            if size and size < vectors.shape[1]:
                vectors = vectors[:, :size]
                if dimensions and self._is_unit:
                    vectors = torch.nn.functional.normalize(vectors, dim=-1)
            return vectors.contiguous().cpu()

    def _row(self, text: str) -> "Row":
        if len(text) > MOST_CHARACTERS:
            raise BadInput(f"a text has {len(text)} characters with its prompt, and may have {MOST_CHARACTERS}")
        try:
            return self._tokens_of(text) if len(text) <= _LONG else self._encoder.tokens(text)
        except (UnicodeEncodeError, TypeError):
            raise BadInput("the text holds half a character (a lone surrogate)") from None

    def _dimensions(self, wanted: Any) -> int:
        if wanted is None:
            return 0
        if type(wanted) is not int or not 1 <= wanted <= self.width:
            raise BadInput(f"'dimensions' must be a whole number from 1 to {self.width}, not {wanted!r:.100}")
        if wanted != self.width and self._matryoshka is None:
            raise BadInput(
                f"'dimensions' must be {self.width}, the length of this model's vectors: its config.json declares no others (is_matryoshka)"
            )
        if self._matryoshka and wanted not in (*self._matryoshka, self.width):
            raise BadInput(f"'dimensions' must be one of {', '.join(map(str, self._matryoshka))}, not {wanted}")
        return wanted


def _modules(weights: Weights, device: str) -> "tuple[Encoder | Static, Sequence[Step]]":
    layout = read_layout(weights, device)
    if layout is None:
        encoder = Encoder(weights, device, is_plain=True)
        pooling = encoder.default_pooling()
        log.log(
            logging.WARNING if encoder.other_use else logging.INFO,
            "the weights have no modules.json, as models made for embeddings have: a text's vector is %s%s",
            "its last token's" if pooling.modes == ("lasttoken",) else "the mean of its tokens'",
            encoder.other_use and f"; {encoder.other_use}",
        )
        return encoder, [pooling]
    below = weights.folder(layout.folder) if layout.folder else weights
    return Static(below, device) if layout.first == "StaticEmbedding" else Encoder(below, device), layout.steps


class Prompts:
    """What is put before each text, by name, as `config_sentence_transformers.json` has it."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._named: dict[str, str] = {
            name: text or "" for name, text in ({"query": "", "document": ""} | (config.get("prompts") or {})).items()
        }
        name = config.get("default_prompt_name")
        if name is not None and name not in self._named:
            raise WeightsError(f"config_sentence_transformers.json: default_prompt_name is {name!r}, which is none of {list(self._named)}")
        self.default: str | None = None if name is None else self._named[name]
        self.truncate_to = int(config.get("truncate_dim") or 0)  # numbers of each vector; 0 for all

    def find(self, parameters: Mapping[str, Any]) -> str | None:
        """The prompt that a request asks for. Raises BadInput."""
        prompt, name = parameters.get("prompt"), parameters.get("prompt_name")
        if prompt is not None and name is not None:
            raise BadInput("give 'prompt' or 'prompt_name', not both")
        if prompt is None and name is None:
            return self.default
        if prompt is not None:
            if not isinstance(prompt, str):
                raise BadInput(f"'prompt' must be a string, not {type(prompt).__name__}")
            return prompt
        if not isinstance(name, str):
            raise BadInput(f"'prompt_name' must be a string, not {type(name).__name__}")
        if name not in self._named:
            raise BadInput(f"there is no prompt {name!r:.100}; this model has {', '.join(map(repr, self._named))}")
        return self._named[name]


Row = tuple["array[int]", "array[int]"]  # ids of a text's tokens, and the types of each


class Encoder:
    """A model of transformers that gives a vector for each token."""

    def __init__(self, weights: Weights, device: str, *, is_plain: bool = False) -> None:
        """is_plain: the folder is no model of sentence-transformers. Raises WeightsError, SettingsError."""
        said: Mapping[str, Any] = {}
        if not is_plain:
            said = next((found for name in _OF_TRANSFORMER if (found := read_json(weights, name))), said)
        config = loading.read_config(weights)
        for name, value in _of_either(said, "config").items():
            setattr(config, name, value)
        if getattr(config, "is_encoder_decoder", False) and config.model_type not in _ENCODERS:
            raise WeightsError(f"a model of type {config.model_type!r} has a decoder, and is not known here as one for embeddings")
        if hasattr(config, "use_cache"):
            config.use_cache = False
        dtype = _of_either(said, "model").get("dtype") or _of_either(said, "model").get("torch_dtype")
        self.config = config.to_dict()
        self._architectures: Sequence[str] = config.architectures or []
        self.other_use = choice.other_use(config)
        self._is_causal = bool(getattr(config, "is_causal", True))
        kind = _ENCODERS.get(config.model_type, "AutoModel")
        named = for_agents().dtype or (dtype if dtype in loading.DTYPES else None)
        self._model = loading.load_model(weights, device, kind, config=config, dtype=named, spare=("pooler.",))
        self._device = next(self._model.parameters()).device
        self._tokenizer = self._make_tokenizer(weights, said, config)
        self.limit: int = min(int(self._tokenizer.model_max_length), _UNBOUNDED)  # tokens of a text
        self._how = (said.get("modality_config") or {}).get("text") or {"method": "forward", "method_output_name": "last_hidden_state"}
        self._makes = said.get("module_output_name") or TOKENS
        if is_plain and getattr(self._tokenizer, "chat_template", None):
            raise WeightsError(
                "the folder has a chat template and no modules.json, so that it is not told how texts become vectors: save it once with "
                "sentence-transformers, SentenceTransformer(modules=[…]).save(FOLDER)"
            )

    def _make_tokenizer(self, weights: Weights, said: Mapping[str, Any], config: Any) -> Any:
        tokenizer = loading.load_tokenizer(weights)
        asked = {**_of_either(said, "processor"), **_of_either(said, "tokenizer")}
        if said.get("max_seq_length") is not None:
            asked.setdefault("model_max_length", said["max_seq_length"])
        for name, value in asked.items():
            setattr(tokenizer, name, value)
        places = getattr(config, "max_position_embeddings", None)
        if "model_max_length" not in asked and places not in (None, -1):
            tokenizer.model_max_length = min(tokenizer.model_max_length, places)
        table: Any = getattr(getattr(self._model, "embeddings", None), "position_embeddings", None)
        if getattr(table, "padding_idx", None) is not None:  # RoBERTa's kind count places from behind it; the library fails on longer texts
            tokenizer.model_max_length = min(tokenizer.model_max_length, table.num_embeddings - table.padding_idx - 1)
        backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        if backend is None:
            tokenizer.do_lower_case = said.get("do_lower_case", False)
            return tokenizer
        if said.get("do_lower_case"):
            from tokenizers import normalizers

            has = backend.normalizer
            backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *([] if has is None else [has])])
        backend.no_padding()
        backend.no_truncation()
        if tokenizer.model_max_length < _UNBOUNDED:
            backend.enable_truncation(int(tokenizer.model_max_length), direction=tokenizer.truncation_side)
        return tokenizer

    def default_pooling(self) -> Pooling:
        """What makes one vector of its tokens' in a folder without `modules.json`."""
        is_causal = self._architectures and self._architectures[0].endswith("ForCausalLM") and self._is_causal
        return Pooling(("lasttoken" if is_causal else "mean",))

    def tokens(self, text: str) -> Row:
        """A text's tokens, cut at the longest that the model takes."""
        if not self._tokenizer.is_fast:
            ids = self._tokenizer(text, truncation=True)["input_ids"]
            return array("i", ids), array("i", [0] * len(ids))
        found = self._tokenizer.backend_tokenizer.encode(text)
        return array("i", found.ids), array("i", found.type_ids)

    def prompt_tokens(self, prompt: str) -> int:
        """How many of them a prompt is, without the special token that may end it."""
        ids, _ = self.tokens(prompt)
        return len(ids) - (bool(ids) and ids[-1] in self._tokenizer.all_special_ids)

    def run(self, rows: Sequence[Row]) -> Features:
        """One pass for all. Raises BadInput for a text without a token."""
        import torch

        if not all(ids for ids, _ in rows):
            raise BadInput("a text has no tokens: send one that is not empty")
        tokenizer, longest = self._tokenizer, max(len(ids) for ids, _ in rows)
        is_left = tokenizer.padding_side == "left"

        def padded(lists: Sequence[Sequence[int]], filler: int) -> "Tensor":
            grid = np.full((len(lists), longest), filler, np.int64)
            for row, numbers in zip(grid, lists, strict=True):
                row[longest - len(numbers) if is_left else 0 :][: len(numbers)] = numbers
            return torch.from_numpy(grid).to(self._device)

        mask = padded([[1] * len(ids) for ids, _ in rows], 0)
        given = {"input_ids": padded([ids for ids, _ in rows], tokenizer.pad_token_id or 0), "attention_mask": mask}
        if "token_type_ids" in tokenizer.model_input_names:
            given["token_type_ids"] = padded([types for _, types in rows], tokenizer.pad_token_type_id)
        found = getattr(self._model, self._how["method"])(**given)
        names = self._how["method_output_name"] or []
        for name in [names] if isinstance(names, str) else names:
            found = found[name]
        return Features({self._makes: found}, mask)


class Static:
    """A table of vectors, one for each token, of which a text's are averaged; there is no model."""

    def __init__(self, weights: Weights, device: str) -> None:
        """Raises WeightsError."""
        from tokenizers import Tokenizer

        tensors = dict(weights.only("model.safetensors").to(device))  # not those of the steps behind it
        if "embedding.weight" not in tensors:
            raise WeightsError(f"a StaticEmbedding has the tensor embedding.weight; the weights have {', '.join(sorted(tensors))}")
        self.config: Mapping[str, Any] = {}
        self.limit = _UNBOUNDED
        self._table = tensors["embedding.weight"]
        self._tokenizer = Tokenizer.from_file(str(weights.path("tokenizer.json")))
        self._tokenizer.no_padding()

    def tokens(self, text: str) -> Row:
        """A text's tokens, all of them."""
        return array("i", self._tokenizer.encode(text, add_special_tokens=False).ids), array("i")

    def prompt_tokens(self, prompt: str) -> int:
        """None: there is no step that would leave them out."""
        return 0

    def run(self, rows: Sequence[Row]) -> Features:
        """A text without tokens is a vector of zeros."""
        import torch

        ids = torch.tensor([token for row, _ in rows for token in row], dtype=torch.int64, device=self._table.device)
        lengths = torch.tensor([0, *(len(row) for row, _ in rows)], device=self._table.device)
        vectors = torch.nn.functional.embedding_bag(ids, self._table, lengths.cumsum(0)[:-1], mode="mean")
        return Features({SENTENCE: vectors}, torch.ones(len(rows), 0, dtype=torch.int64))


def _of_either(said: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """What is to be changed in a model, tokenizer or config, under its older or its newer name."""
    found = said.get(f"{what}_kwargs") or said.get(f"{what}_args") or {}
    return {name: value for name, value in found.items() if name != "trust_remote_code"}
