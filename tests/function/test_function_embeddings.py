"""The embeddings agent beside sentence-transformers, on models of random numbers that are saved as the library saves them."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient

from function.agent import BadInput, TensorSpec, Weights
from function.app import create_app
from function.model import Model
from function.settings import FunctionSettings
from tests.support import fill_cache, wait_until
from weights_cache.errors import WeightsError
from weights_cache.settings import WeightsSettings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
URI = "s3://models/embeddings"
VOCABULARY = "the a man is eating food query : passage bread stock market fell sharply today . Ä b c d e f g"
TEXTS = ["the man is eating food .", "bread", "a b c d e f g " * 6, "  The  STOCK ", "query : passage"]
Loader = Callable[..., Any]


def tokenizer(*, ends: bool = True, **options: Any) -> Any:
    """Words are tokens; of some models with a token at each end, as BERT has them."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    names = [*special.values(), *VOCABULARY.split()]
    made = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
        made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", pair, [("[CLS]", names.index("[CLS]")), ("[SEP]", 3)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special, **options)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain folder of transformers."""
    import torch
    import transformers

    torch.manual_seed(7)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    folder = tmp_path_factory.mktemp("bert")
    transformers.BertModel(transformers.BertConfig(vocab_size=40, max_position_embeddings=24, **sizes)).save_pretrained(folder)
    tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"]).save_pretrained(folder)
    return folder


@pytest.fixture
def load(tmp_path: Path) -> Loader:
    def load(folder: Path, device: str = "cpu") -> Any:
        from function.agents.transformers import Embeddings

        fill_cache(tmp_path, URI, {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()})
        agent = Embeddings()
        agent.load(Weights(WeightsSettings(uri=URI, cache_dir=tmp_path)), device)
        agent.warm_up()
        return agent

    return load


def theirs(folder: Path, texts: list[str] = TEXTS, **how: Any) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", local_files_only=True).encode(texts, **how)


def save(folder: Path, *modules: Any, **options: Any) -> Path:
    from sentence_transformers import SentenceTransformer

    SentenceTransformer(modules=list(modules), device="cpu", **options).save(str(folder))
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_plain_encoder_is_the_mean_over_its_tokens(bert: Path, load: Loader) -> None:
    agent = load(bert)
    assert np.allclose(agent.predict(TEXTS, {}), theirs(bert), atol=1e-5)
    assert agent.outputs == [TensorSpec("output", "FP32", (-1, 16))]
    assert [agent.size(text) for text in TEXTS] == [8, 3, 24, 4, 5]  # cut at the model's places


@pytest.mark.parametrize(
    ("mode", "side"),
    [
        *((mode, "right") for mode in ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", ("mean", "max", "cls"))),
        *((mode, "left") for mode in ("cls", "weightedmean", "lasttoken")),
    ],
    ids=str,
)
def test_each_pooling_is_the_librarys_with_and_without_its_prompt(bert: Path, load: Loader, tmp_path: Path, mode: Any, side: str) -> None:
    import sentence_transformers
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    model = Transformer(str(bert), max_seq_length=12)
    model.tokenizer.padding_side = side
    width = 16 * (1 if isinstance(mode, str) else len(mode))
    steps = [Pooling(16, mode, include_prompt=False), Dense(width, 8), Normalize()]
    folder = save(tmp_path / "saved", model, *steps, prompts={"query": "query : ", "long": "a b c d e f g " * 2})
    agent = load(folder)
    library = sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    for how in ({}, {"prompt_name": "query"}, {"prompt": "the man "}, {"prompt": ""}):
        assert np.allclose(agent.predict(TEXTS, how), library.encode(TEXTS, **how), atol=1e-5), how


def test_a_folder_as_older_versions_saved_it(bert: Path, load: Loader, tmp_path: Path) -> None:
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
    from torch import nn

    folder = save(
        tmp_path / "saved",
        Transformer(str(bert)),
        Pooling(16, ("cls", "mean")),
        Dense(32, 16, bias=False, activation_function=nn.GELU()),
        LayerNorm(16),
    )
    (folder / "0_Transformer").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).rename(folder / "0_Transformer" / name)
    (folder / "sentence_bert_config.json").unlink()
    (folder / "0_Transformer" / "sentence_bert_config.json").write_text('{"max_seq_length": 9, "do_lower_case": true}')
    old = {
        "word_embedding_dimension": 16,
        "pooling_mode_cls_token": True,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False,
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(old))
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    for module in modules:
        module["type"] = f"sentence_transformers.models.{module['type'].rpartition('.')[2]}"
    (folder / "modules.json").write_text(json.dumps(modules))
    edit(folder / "config_sentence_transformers.json", prompts={"query": "query : "}, default_prompt_name="query", truncate_dim=10)
    agent = load(folder)
    assert np.allclose(agent.predict(TEXTS, {}), theirs(folder), atol=1e-5)
    assert agent.predict(["the"], {})[0].shape == (10,)
    assert (agent.size("the"), agent.size(TEXTS[2])) == (5, 9)
    assert np.allclose(load(folder, "host").predict(TEXTS, {}), theirs(folder), atol=1e-5)  # the way of a device, in ordinary memory


def test_a_language_model_gives_its_last_token(load: Loader, tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
    config = transformers.LlamaConfig(vocab_size=40, max_position_embeddings=64, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer(ends=False, padding_side="left").save_pretrained(tmp_path / "llama")
    agent = load(tmp_path / "llama")
    assert np.allclose(agent.predict(TEXTS, {}), theirs(tmp_path / "llama"), atol=1e-5)
    with pytest.raises(BadInput, match="a text has no tokens"):
        agent.predict([""], {})


@pytest.mark.parametrize("of_bytes", [False, True], ids=["of words", "of bytes, in Python"])
def test_of_a_model_with_a_decoder_the_encoder_is_enough(load: Loader, tmp_path: Path, of_bytes: bool) -> None:
    import transformers

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=384, **sizes)).save_pretrained(tmp_path / "t5")
    (transformers.ByT5Tokenizer(model_max_length=20) if of_bytes else tokenizer()).save_pretrained(tmp_path / "t5")
    assert np.allclose(load(tmp_path / "t5").predict(TEXTS, {}), theirs(tmp_path / "t5"), atol=1e-5)


def test_a_model_that_counts_places_from_behind_its_padding_takes_fewer_tokens(load: Loader, tmp_path: Path) -> None:
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.RobertaConfig(vocab_size=40, max_position_embeddings=16, pad_token_id=1, **sizes)
    transformers.RobertaModel(config).save_pretrained(tmp_path / "roberta")
    tokenizer(model_input_names=["input_ids", "attention_mask"]).save_pretrained(tmp_path / "roberta")
    agent = load(tmp_path / "roberta")
    assert agent.size(TEXTS[2]) == 14
    assert np.allclose(agent.predict(TEXTS[:2], {}), theirs(tmp_path / "roberta", TEXTS[:2]), atol=1e-5)
    assert np.isfinite(agent.predict(TEXTS, {})).all()


def test_a_table_of_tokens_needs_no_model(load: Loader, tmp_path: Path) -> None:
    from sentence_transformers.base.modules import Dense
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    folder = save(tmp_path / "saved", StaticEmbedding(tokenizer(ends=False), embedding_dim=6), Dense(6, 4))
    assert np.allclose(load(folder).predict([*TEXTS, ""], {}), theirs(folder, [*TEXTS, ""]), atol=1e-5)


def test_the_weights_are_used_where_they_lie(bert: Path, load: Loader) -> None:
    agent = load(bert)
    mapped = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "/blobs/" in line]
    places = [tuple(int(end, 16) for end in line[0].split("-")) for line in mapped]
    parameters = [one for name, one in agent._encoder._model.named_parameters() if not name.startswith("pooler.")]
    assert parameters
    assert all(any(begin <= one.data_ptr() < end for begin, end in places) for one in parameters)


def test_company_in_the_batch_changes_nothing(bert: Path, load: Loader) -> None:
    agent = load(bert)
    together = agent.predict(TEXTS, {})
    for text, vector in zip(TEXTS, together, strict=True):
        assert np.allclose(agent.predict([text], {})[0], vector, atol=1e-5)


def test_vectors_are_shortened_where_the_model_declares_it_and_keep_their_length(bert: Path, load: Loader, tmp_path: Path) -> None:
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    folder = save(tmp_path / "saved", Transformer(str(bert)), Pooling(16), Normalize())
    (folder / "2_Normalize" / "config.json").unlink()  # of older versions nothing is in it, and git keeps no empty folders
    with pytest.raises(BadInput, match="'dimensions' must be 16, the length of this model's vectors"):
        load(folder).predict(["bread"], {"dimensions": 8})
    edit(folder / "config.json", is_matryoshka=True, matryoshka_dimensions=[4, 8])
    agent = load(folder)
    assert np.allclose(agent.predict(TEXTS, {"dimensions": 8}), theirs(folder, truncate_dim=8, normalize_embeddings=True), atol=1e-5)
    for wanted, says in ((5, "one of 4, 8"), (0, "from 1 to 16"), (True, "from 1 to 16"), (17, "from 1 to 16")):
        with pytest.raises(BadInput, match=says):
            agent.predict(["bread"], {"dimensions": wanted})


@pytest.mark.parametrize(
    ("inputs", "parameters", "says"),
    [
        ([1], {}, "each instance must be a text .a string., not int"),
        (["a"], {"promt": "x"}, "there is no parameter 'promt'; this model takes prompt, prompt_name, dimensions"),
        (["a"], {"prompt_name": "x"}, "there is no prompt 'x'; this model has 'query', 'document'"),
        (["a"], {"prompt_name": "query", "prompt": "x"}, "'prompt' or 'prompt_name', not both"),
        (["a"], {"prompt": 1}, "'prompt' must be a string"),
        (["a"], {"prompt_name": []}, "'prompt_name' must be a string"),
        (["\ud800"], {}, "half a character"),
        (["a" * (1 << 20)], {"prompt": "b"}, "1048577 characters with its prompt, and may have 1048576"),
    ],
)
def test_what_is_not_understood_is_refused(bert: Path, load: Loader, inputs: Any, parameters: Any, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        load(bert).predict(inputs, parameters)


@pytest.mark.parametrize(
    ("module", "config", "says"),
    [
        ("sentence_transformers.models.CNN", {}, "modules.json has a module CNN; Pooling, Dense"),
        ("sentence_transformers.models.Pooling", {"pooling_mode": "median"}, "there is no pooling mode 'median'"),
        ("sentence_transformers.models.Dense", {}, "has no model.safetensors"),
    ],
)
def test_a_module_that_is_not_known_fails_the_start(bert: Path, load: Loader, tmp_path: Path, module: str, config: Any, says: str) -> None:
    folder = tmp_path / "saved"
    (folder / "1_It").mkdir(parents=True)
    for path in bert.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "1_It" / "config.json").write_text(json.dumps(config))
    first = {"type": "sentence_transformers.models.Transformer", "path": ""}
    (folder / "modules.json").write_text(json.dumps([first, {"type": module, "path": "1_It"}]))
    with pytest.raises(WeightsError, match=says):
        load(folder)


def test_long_texts_are_not_kept_and_their_size_is_estimated(bert: Path, load: Loader) -> None:
    agent = load(bert)
    seen: list[int] = []
    tokens = agent._encoder.tokens

    def counted(text: str) -> Any:
        seen.append(len(text))
        return tokens(text)

    agent._encoder.tokens = counted
    long, kept = "bread and " * 1000, agent._tokens_of.cache_info().currsize
    assert agent.size(long) == agent._encoder.limit
    assert seen == []
    assert np.allclose(agent.predict([long], {}), agent.predict([long[: len(long) // 2]], {}), atol=1e-5)
    assert seen == [10_000, 5000]
    assert agent._tokens_of.cache_info().currsize == kept


# Through the app


@pytest.fixture
def client(bert: Path, tmp_path: Path) -> Iterator[FlaskClient]:
    """A model that declares vectors of 8 numbers."""
    files = {path.name: path.read_bytes() for path in bert.iterdir()}
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | {"matryoshka_dimensions": [8]}).encode()
    fill_cache(tmp_path, URI, files)
    settings = FunctionSettings(agent="function.agents.transformers:Embeddings", model_name="m")
    model = Model(settings, Weights(WeightsSettings(uri=URI, cache_dir=tmp_path)), started_at=time.monotonic())
    failed = threading.Event()
    model.start(on_failure=lambda _: failed.set())
    wait_until("ready", lambda: failed.is_set() or model.phase == "ready")
    yield create_app(settings, model).test_client()
    model.drain()
    assert model.close(10)


def test_openais_route_tells_vectors_and_tokens_and_takes_dimensions(client: FlaskClient, bert: Path) -> None:
    found: Any = client.post("/v1/embeddings", json={"model": "m", "input": TEXTS}).json
    vectors = [one["embedding"] for one in found["data"]]
    assert np.allclose(vectors, theirs(bert), atol=1e-5)
    assert found["usage"] == {"prompt_tokens": 44, "total_tokens": 44}
    short: Any = client.post("/v1/embeddings", json={"model": "m", "input": TEXTS, "dimensions": 8}).json
    assert [one["embedding"] for one in short["data"]] == [vector[:8] for vector in vectors]
    refused = client.post("/v1/embeddings", json={"model": "m", "input": "bread", "dimensions": 9})
    assert (refused.status_code, "one of 8" in refused.text) == (400, True)


def test_v1_and_v2_have_the_same_vectors(client: FlaskClient) -> None:
    by_v1: Any = client.post("/", json={"instances": ["bread"], "parameters": {"prompt": "query : "}}).json
    given = {"name": "input", "shape": [1], "datatype": "BYTES", "data": ["query : bread"]}
    by_v2: Any = client.post("/v2/models/m/infer", json={"inputs": [given]}).json
    assert by_v2["outputs"] == [{"name": "output", "datatype": "FP32", "shape": [1, 16], "data": by_v1["predictions"][0]}]
