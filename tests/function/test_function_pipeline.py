"""The agent of transformers' tasks beside the library's own pipelines, on tiny models with random weights that are made here."""

import base64
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from function.agent import BadInput, Weights
from function.agents import examples
from tests.support import Server, clean_environment, fill_cache, free_port, request, running
from weights_cache.environment import SettingsError
from weights_cache.errors import WeightsError
from weights_cache.settings import WeightsSettings

URI = "s3://models/tiny"
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the a cat dog man john smith lives in paris berlin eats reads food who where is this example . , ?"
VOCABULARY = [*WORDS.split(), *"bcdefghijklmnopqrstuvwxyz", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]
SIZES: Mapping[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
LIMIT = 64  # tokens of a text
TEXTS = ["the cat eats", "john smith lives in paris , who reads is the dog in berlin ?", "a man"]
CONTEXT = "john smith lives in paris . the cat eats food in berlin . a man reads is this example ."
SPEECH: Mapping[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 32}

Made = tuple[Path, Any]  # the folder as the library saves it, the model


class Workshop:
    """Makes models, and agents that restore them."""

    def __init__(self, folder: Path) -> None:
        from function.agents.transformers.loading import library

        self._folder = folder
        self.library = library()
        (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
        self.tokenizer = self.library.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=LIMIT)

    def save(self, name: str, model: Any, *others: Any) -> Path:
        folder = self._folder / name
        for one in (model, *others):
            one.save_pretrained(folder)
        return folder

    def bert(self, kind: str, labels: Sequence[str] = ("O", "B-PER", "I-PER", "B-LOC"), **options: Any) -> Path:
        name = f"{kind}-{'-'.join(labels)}"
        if not (self._folder / name).exists():
            torch.manual_seed(len(name))
            numbered = dict(enumerate(labels))
            config = self.library.BertConfig(
                **SIZES,
                **options,
                vocab_size=len(VOCABULARY),
                max_position_embeddings=LIMIT,
                initializer_range=0.5,
                id2label=numbered,
                label2id={label: number for number, label in numbered.items()},
            )
            self.save(name, getattr(self.library, f"Bert{kind}")(config), self.tokenizer)
        return self._folder / name

    def agent(self, folder: Path, task: str | None = None, more: Mapping[str, bytes] = {}) -> Any:
        from function.agents.transformers import Pipeline

        cache = self._folder / f"cache-{folder.name}-{task}-{len(more)}"
        fill_cache(cache, URI, {**{path.name: path.read_bytes() for path in folder.iterdir()}, **more})
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FUNCTION_AGENT", "function.agents.transformers:Pipeline")
            patch.delenv("FUNCTION_TASK", raising=False)
            if task:
                patch.setenv("FUNCTION_TASK", task)
            agent = Pipeline()
            agent.load(Weights(WeightsSettings(uri=URI, cache_dir=cache)), "cpu")
        agent.warm_up()
        return agent


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several are slower for models that are this small
    yield Workshop(tmp_path_factory.mktemp("models"))
    torch.set_num_threads(threads)


def assert_alike(mine: Any, theirs: Any) -> None:
    """Of one shape, and numbers equal but for rounding."""
    if isinstance(theirs, dict):
        assert mine.keys() == theirs.keys()
        for name in theirs:
            assert_alike(mine[name], theirs[name])
    elif isinstance(theirs, list | tuple):
        assert len(mine) == len(theirs)
        for one, other in zip(mine, theirs, strict=True):
            assert_alike(one, other)
    elif isinstance(theirs, float | np.floating):
        assert float(mine) == pytest.approx(float(theirs), abs=1e-5)
    else:
        assert (type(mine), mine) == (type(theirs), theirs)


def assert_same_alone(agent: Any, inputs: Sequence[Any], parameters: Mapping[str, Any], together: Sequence[Any]) -> None:
    for one, answer in zip(inputs, together, strict=True):
        assert_alike(agent.predict([one], parameters)[0], answer)


def assert_example_is_answered(agent: Any, folder: Path) -> None:
    """The request that a project gets when the model is saved."""
    example = examples.of_transformers(folder)
    assert example is not None
    inputs = [base64.b64decode(one["b64"]) if "b64" in one else one for one in example["instances"]]  # as the server does
    assert len(agent.predict(inputs, example.get("parameters", {}))) == 1


PAIRS = [{"text": "the cat", "text_pair": "a man eats food"}, {"text": "who"}, {"text": "the cat", "text_pair": ""}]
NER = [{}, {"ignore_labels": ["B-PER"]}, *({"aggregation_strategy": how} for how in ("simple", "first", "average", "max"))]
LABELS: Sequence[Mapping[str, Any]] = [
    {"candidate_labels": ["cat", "the food"]},
    {"candidate_labels": "cat, dog", "multi_label": True, "hypothesis_template": "is {} ?"},
]
MASKED = ["the [MASK] eats", "a [MASK] lives in berlin , and reads is the [MASK]", "[MASK]"]
LONG = ["john smith lives in paris . " * 12, "a cat"]


@pytest.mark.parametrize(
    ("kind", "task", "inputs", "parameters"),
    [
        pytest.param("ForSequenceClassification", "text-classification", TEXTS, [{}, {"top_k": 2}, {"top_k": None}], id="texts"),
        pytest.param("ForSequenceClassification", "text-classification", PAIRS, [{}, {"function_to_apply": "sigmoid"}], id="pairs"),
        pytest.param("ForSequenceClassification", "text-classification", LONG, [{"truncation": True}], id="long texts"),
        pytest.param("ForTokenClassification", "token-classification", TEXTS, NER, id="entities"),
        pytest.param(
            "ForTokenClassification", "token-classification", LONG, [{"aggregation_strategy": "simple", "stride": 5}], id="pieces"
        ),
        pytest.param("ForMaskedLM", "fill-mask", MASKED, [{}, {"top_k": 2}, {"targets": ["cat", "dog"]}], id="masks"),
        pytest.param("Model", "feature-extraction", TEXTS, [{}], id="features"),
    ],
)
def test_answers_are_those_of_the_librarys_pipeline(
    kind: str, task: str, inputs: Sequence[Any], parameters: Sequence[Mapping[str, Any]], workshop: Workshop
) -> None:
    folder = workshop.bert(kind)
    agent = workshop.agent(folder)
    assert agent.task == task
    assert_example_is_answered(agent, folder)
    theirs = workshop.library.pipeline(task, model=str(folder), device="cpu")
    for said in parameters:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: None)  # the library's own, with each call
            expected = theirs(list(inputs), **said)
        together = agent.predict(inputs, said)
        assert_alike(together, expected)
        assert_same_alone(agent, inputs, said, together)


def test_labels_of_the_callers_own_are_scored_as_by_the_librarys_pipeline(workshop: Workshop) -> None:
    folder = workshop.bert("ForSequenceClassification", ("contradiction", "neutral", "entailment"))
    agent = workshop.agent(folder, "zero-shot-classification")
    theirs = workshop.library.pipeline("zero-shot-classification", model=str(folder), device="cpu")
    for said in LABELS:
        together = agent.predict(TEXTS, said)
        assert_alike(together, theirs(TEXTS, **said))
        assert_same_alone(agent, TEXTS, said, together)
        assert_alike(agent.predict([{"sequence": TEXTS[0], **said}, {"sequence": TEXTS[1], "candidate_labels": ["x"]}], {})[0], together[0])


def png(image: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def test_images_come_as_bytes_and_are_labelled_as_by_the_librarys_pipeline(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    config = workshop.library.ViTConfig(**SIZES, image_size=16, patch_size=8, num_labels=7, initializer_range=0.5)
    processor = workshop.library.ViTImageProcessor(size={"height": 16, "width": 16})
    folder = workshop.save("vit", workshop.library.ViTForImageClassification(config), processor)
    agent = workshop.agent(folder)
    assert agent.media_types == ("image/*",)
    assert_example_is_answered(agent, folder)
    draw = np.random.default_rng(1)
    images = [Image.fromarray(draw.integers(0, 255, (*shape, 3), dtype=np.uint8)) for shape in ((30, 20), (16, 16))]
    theirs = workshop.library.pipeline("image-classification", model=str(folder), device="cpu")
    said: dict[str, Any]
    for said in ({}, {"top_k": 2}, {"function_to_apply": "none"}):
        assert_alike(agent.predict([png(image) for image in images], said), theirs(images, **said))
    for wrong in (b"x", png(images[0])[:100], "http://example.com/cat.png", {"image": 1}):
        with pytest.raises(BadInput, match="image"):
            agent.predict([wrong], {})
    # What a small body holds is known before it is decoded, and a broken one may have Pillow raise anything.
    grey = png(Image.new("L", (7500, 7500)))
    with pytest.raises(BadInput, match=r"56250000 pixels \(7500 × 7500\); together they may have 50000000"):
        agent.predict([grey], {})
    with pytest.raises(BadInput, match=r"1040 × 16 pixels: the longer side may be 64 times"):
        agent.predict([png(Image.new("L", (1040, 16)))], {})
    monkeypatch.setattr(agent._task, "_most", 800)
    with pytest.raises(BadInput, match=r"256 pixels \(16 × 16\), and those before it 600"):
        agent.predict([png(image) for image in images], {})
    jpeg = io.BytesIO()
    images[0].resize((50, 60)).save(jpeg, "JPEG")
    assert len(agent.predict([jpeg.getvalue()], {})) == 1  # it is decoded smaller
    monkeypatch.setattr(agent._task._images, "open", lambda *_, **__: 1 / 0)
    with pytest.raises(BadInput, match="the image cannot be used: division by zero"):
        agent.predict([png(images[1])], {})


def wave(samples: Any, rate: int = 16_000) -> bytes:
    import soundfile

    data = io.BytesIO()
    soundfile.write(data, samples, rate, format="WAV", subtype="FLOAT")
    return data.getvalue()


def test_speech_comes_as_bytes_and_is_written_down_as_by_the_librarys_pipeline(workshop: Workshop, tmp_path: Path) -> None:
    torch.manual_seed(3)
    layers = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    config = workshop.library.Wav2Vec2Config(**SPEECH, **layers, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)
    letters = {letter: number for number, letter in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"])}
    (tmp_path / "vocab.json").write_text(json.dumps(letters))
    tokenizer = workshop.library.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    folder = workshop.save("speech", workshop.library.Wav2Vec2ForCTC(config), tokenizer, workshop.library.Wav2Vec2FeatureExtractor())
    agent = workshop.agent(folder)
    assert (agent.task, agent.media_types) == ("automatic-speech-recognition", ("audio/*", "video/*"))
    assert_example_is_answered(agent, folder)
    samples = np.random.default_rng(0).normal(size=3200).astype(np.float32) / 10
    theirs = workshop.library.pipeline("automatic-speech-recognition", model=str(folder), device="cpu")
    expected = theirs({"raw": samples, "sampling_rate": 16_000})
    as_numbers = {"raw": samples.tolist(), "sampling_rate": 16_000}
    assert agent.predict([wave(samples), as_numbers], {}) == [expected, expected]
    said = {"return_timestamps": "word"}
    assert agent.predict([wave(samples)], said) == [theirs({"raw": samples, "sampling_rate": 16_000}, **said)]
    for wrong in (b"x", wave(samples[:100]), "cat.wav", {"raw": [1.0], "sampling_rate": 8000}):
        with pytest.raises(BadInput, match=r"record|sampling_rate"):
            agent.predict([wrong], {})
    with pytest.raises(BadInput, match="no parameter 'language'"):
        agent.predict([wave(samples)], {"language": "en"})
    for raw in (["1"] * 3200, [None] * 3200, [True] * 3200, [1e300] * 3200, [10**400] * 3200):
        with pytest.raises(BadInput, match="must be a recording"):
            agent.predict([{"raw": raw, "sampling_rate": 16_000}], {})
    assert_recordings_are_bounded(agent, samples)


def assert_recordings_are_bounded(agent: Any, samples: Any) -> None:
    silence = np.zeros(16_000 * 121, np.int16)
    lies = bytearray(flac(silence[:3200]))
    lies[21] |= 0x0F  # of 36 bits that say how many samples there are
    lies[22:26] = b"\xff" * 4
    cases: list[tuple[bytes, Mapping[str, Any], str]] = [
        (bytes(lies), {}, "68719476735 samples, and may have 57600000"),
        (flac(silence), {}, "121 s long, and one pass takes 120"),
        (flac(silence[: 16_000 * 100]), {"chunk_length_s": 1, "stride_length_s": 0.3}, "a quarter of 'chunk_length_s' at most, 0.25"),
        (wave(samples), {"stride_length_s": 1}, "wants 'chunk_length_s'"),
        (flac(np.tile(silence, 2)), {"chunk_length_s": 1}, "363 pieces of 1 s, and may make 256"),
    ]
    for data, said, reason in cases:
        with pytest.raises(BadInput, match=reason):
            agent.predict([data], said)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent._task, "_most", 5000)
        with pytest.raises(BadInput, match="more than 5000 samples together"):
            agent.predict([wave(samples)] * 2, {})


def flac(samples: Any) -> bytes:
    import soundfile

    data = io.BytesIO()
    soundfile.write(data, samples, 16_000, format="FLAC")
    return data.getvalue()


# Tasks whose pipelines the library has no more


def best_span(folder: Path, question: str, workshop: Workshop) -> tuple[float, str]:
    """The likeliest answer of at most 15 tokens, found by trying each; not aligned to words."""
    model = workshop.library.BertForQuestionAnswering.from_pretrained(folder)
    encoded = workshop.tokenizer(question, CONTEXT, return_offsets_mapping=True, return_tensors="pt")
    offsets = encoded.pop("offset_mapping")[0].tolist()
    with torch.inference_mode():
        output = model(**encoded)
    inside = torch.tensor([one == 1 for one in encoded.sequence_ids(0)])
    inside[0] = True  # what stands for no answer has its part of the probability
    start, end = (logits[0].masked_fill(~inside, -torch.inf).softmax(0) for logits in (output.start_logits, output.end_logits))
    places = [at for at in range(1, len(inside)) if inside[at]]
    score, first, last = max((float(start[a] * end[b]), a, b) for a in places for b in places if a <= b < a + 15)
    return score, CONTEXT[offsets[first][0] : offsets[last][1]]


def test_a_question_is_answered_by_the_likeliest_span(workshop: Workshop) -> None:
    folder = workshop.bert("ForQuestionAnswering", ("start", "end"))
    agent = workshop.agent(folder)
    assert agent.task == "question-answering"
    assert_example_is_answered(agent, folder)
    questions = ["where is john ?", "who eats ?", "cat ?"]
    inputs = [{"question": question, "context": CONTEXT} for question in questions]
    answers = agent.predict(inputs, {"align_to_words": False})
    for question, answer in zip(questions, answers, strict=True):
        score, text = best_span(folder, question, workshop)
        assert (answer["score"], answer["answer"]) == (pytest.approx(score, abs=1e-5), text)
        assert CONTEXT[answer["start"] : answer["end"]] == text
    assert_same_alone(agent, inputs, {"align_to_words": False}, answers)
    three = agent.predict([{"question": "who ?", "context": CONTEXT * 3}], {"top_k": 3, "handle_impossible_answer": True})[0]
    assert len(three) == 3
    assert [one["score"] for one in three] == sorted((one["score"] for one in three), reverse=True)


@pytest.mark.parametrize(
    "wrong",
    [
        "who ?",
        {"question": "who ?"},
        {"question": "", "context": "a"},
        {"question": 1, "context": "a"},
        {"question": "who " * 60, "context": "a"},
    ],
)
def test_a_question_that_cannot_be_asked_is_the_callers_mistake(wrong: Any, workshop: Workshop) -> None:
    agent = workshop.agent(workshop.bert("ForQuestionAnswering", ("start", "end")), "question-answering")
    with pytest.raises(BadInput, match="question"):
        agent.predict([wrong], {})


def t5(workshop: Workshop) -> Path:
    torch.manual_seed(4)
    specific = {"summarization": {"prefix": "the ", "num_beams": 2}, "translation_en_to_fr": {"prefix": "a "}}
    sizes = {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 16,
        "num_layers": 1,
        "num_heads": 2,
        "vocab_size": len(VOCABULARY),
        "initializer_factor": 3.0,
    }
    tokens = {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}
    config = workshop.library.T5Config(**sizes, **tokens, task_specific_params=specific)
    return workshop.save("t5", workshop.library.T5ForConditionalGeneration(config), workshop.tokenizer)


@pytest.mark.parametrize(
    ("task", "prefix", "name", "beams"),
    [
        ("summarization", "the ", "summary_text", 2),
        ("translation_en_to_fr", "a ", "translation_text", 4),
        ("text2text-generation", "", "generated_text", 4),
    ],
)
def test_a_text_is_made_by_the_models_own_generate(task: str, prefix: str, name: str, beams: int, workshop: Workshop) -> None:
    folder = t5(workshop)
    agent = workshop.agent(folder, task)
    model = workshop.library.T5ForConditionalGeneration.from_pretrained(folder)
    expected = []
    for text in TEXTS:
        tokens = workshop.tokenizer(prefix + text, return_tensors="pt", return_token_type_ids=False)
        made = model.generate(**tokens, num_beams=beams, max_new_tokens=6)
        expected.append({name: workshop.tokenizer.decode(made[0], skip_special_tokens=True)})
    together = agent.predict(TEXTS, {"max_new_tokens": 6})
    assert together == expected
    for said, reason in (
        ({"max_new_tokens": 4096}, "from 1 to 2048"),
        ({"max_new_tokens": 1024, "num_beams": 16}, "are 16384, and may be 8192"),
    ):
        with pytest.raises(BadInput, match=reason):
            agent.predict(TEXTS, said)
    assert_same_alone(agent, TEXTS, {"max_new_tokens": 6}, together)
    two = agent.predict(TEXTS[:2], {"max_new_tokens": 6, "num_return_sequences": 2})
    assert [len(one) for one in two] == [2, 2]
    with pytest.raises(BadInput, match="num_return_sequences"):
        agent.predict(TEXTS, {"num_return_sequences": 3, "num_beams": 2})


def test_a_model_of_several_languages_translates_from_and_to_those_that_are_said(workshop: Workshop) -> None:
    from function.agents.transformers import Pipeline

    library = workshop.library
    words = ["<s>", "<pad>", "</s>", "<unk>", *(f"\u2581{word}" for word in ("the", "cat", "eats", "a", "man", "der", "hund"))]
    tokenizer = library.MBartTokenizer(vocab=[(word, -float(at)) for at, word in enumerate(words)], src_lang="en_XX", tgt_lang="de_DE")
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "bos_token_id": 0}
    torch.manual_seed(3)
    config = library.MBartConfig(vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, init_std=0.7, **heads)
    model = library.MBartForConditionalGeneration(config).eval()
    agent: Pipeline = workshop.agent(workshop.save("mbart", model, tokenizer), "translation")
    for source, target in (("en_XX", "de_DE"), ("fr_XX", "en_XX")):
        tokenizer.src_lang = source
        first = tokenizer.convert_tokens_to_ids(target)
        expected = []
        for text in TEXTS:
            made = model.generate(**tokenizer(text, return_tensors="pt"), forced_bos_token_id=first, num_beams=4, max_new_tokens=6)
            expected.append({"translation_text": tokenizer.decode(made[0], skip_special_tokens=True)})
        assert agent.predict(TEXTS, {"src_lang": source, "tgt_lang": target, "max_new_tokens": 6}) == expected
    with pytest.raises(BadInput, match="'tgt_lang': the model does not know 'klingon'"):
        agent.predict(["a"], {"src_lang": "en_XX", "tgt_lang": "klingon"})


# Which task


@pytest.mark.parametrize(
    ("task", "kind", "labels", "reason"),
    [
        (None, "ForSequenceClassification", ("contradiction", "entailment"), "FUNCTION_TASK to one of text-classification, zero-shot"),
        (None, "ForMultipleChoice", ("a",), "FUNCTION_TASK to one of text-classification"),
        (None, "LMHeadModel", ("a",), r"function\.agents\.transformers:Chat"),
        ("nonsense", "Model", ("a",), "there is no such task; there are text-classification"),
        ("zero-shot-classification", "ForSequenceClassification", ("a", "b"), "no label 'entailment'"),
        (
            "fill-mask",
            "ForSequenceClassification",
            ("a", "b"),
            r"BertForSequenceClassification.*FUNCTION_TASK=text-classification$",
        ),
        ("token-classification", "ForSequenceClassification", ("a", "b"), r"FUNCTION_TASK=text-classification$"),  # which would load
        ("image-classification", "ForPreTraining", ("a", "b"), "'bert' is none of AutoModelForImageClassification: .* BertForPreTraining"),
        ("question-answering", "Model", ("a", "b"), "As BertForQuestionAnswering, which was asked for, they lack qa_outputs"),
        ("text-clasification", "ForSequenceClassification", ("a", "b"), "did you mean 'text-classification'.*feature-extraction and trans"),
        ("text-generation", "LMHeadModel", ("a",), r"function\.agents\.transformers:Chat"),
    ],
)
def test_a_task_that_is_not_known_or_not_the_models_is_an_error_that_says_what_to_do(
    task: str | None, kind: str, labels: Sequence[str], reason: str, workshop: Workshop
) -> None:
    folder = workshop.bert(kind, labels)
    with pytest.raises((SettingsError, WeightsError), match=reason):
        workshop.agent(folder, task)


def weights_of(folder: Path, cache: Path) -> Weights:
    fill_cache(cache, URI, {path.name: path.read_bytes() for path in folder.iterdir()})
    return Weights(WeightsSettings(uri=URI, cache_dir=cache))


@pytest.mark.parametrize(("kind", "task"), [("ForSequenceClassification", "text-classification"), ("ForMaskedLM", "fill-mask")])
def test_a_model_that_does_not_talk_is_told_which_agent_it_is_for(kind: str, task: str, workshop: Workshop, tmp_path: Path) -> None:
    from function.agents.transformers import Chat

    weights = weights_of(workshop.bert(kind, ("a", "b")), tmp_path)
    with pytest.raises(SettingsError, match=f"model is Bert{kind} .*:Pipeline with FUNCTION_TASK={task}$"):
        Chat().load(weights, "cpu")


def test_what_an_agent_makes_of_a_model_that_was_made_for_another_is_in_the_log(
    workshop: Workshop, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from function.agents.transformers import Embeddings

    monkeypatch.setenv("FUNCTION_DTYPE", "bfloat16")
    agent = Embeddings()
    agent.load(weights_of(workshop.bert("ForSequenceClassification", ("a", "b")), tmp_path), "cpu")
    assert "the mean of its tokens'; the model is BertForSequenceClassification by config.json, for which there is" in caplog.text
    assert agent._encoder._model.dtype == torch.bfloat16
    assert np.isfinite(agent.predict(["the cat"], {})[0]).all()
    workshop.agent(workshop.bert("Model"), more={"modules.json": b"[]"})
    assert "FUNCTION_AGENT=function.agents.transformers:Embeddings" in caplog.text


def test_where_the_config_leaves_a_choice_the_card_decides(workshop: Workshop) -> None:
    folder = workshop.bert("ForSequenceClassification", ("contradiction", "entailment"))
    card = b"---\nlanguage: en\npipeline_tag: zero-shot-classification\n---\n# A model\n"
    agent = workshop.agent(folder, more={"README.md": card})
    assert agent.task == "zero-shot-classification"
    assert examples.of_transformers(folder) is None
    (folder / "README.md").write_bytes(card)
    assert_example_is_answered(agent, folder)
    (folder / "README.md").unlink()


# Requests that cannot be answered


@pytest.mark.parametrize(
    ("inputs", "parameters", "reason"),
    [
        ([3], {}, "must be a string.*not a number"),
        ([None], {}, "not null"),
        ([{"sentence": "x"}], {}, "'sentence' is no field"),
        ([{"messages": []}], {}, r"for text-classification, and does not go on with texts.*POST /"),
        (["cat " * 70], {}, r"72 tokens, and the model takes 64.*truncation"),
        (["\ud800"], {}, "surrogate"),
        (["x"], {"topk": 1}, "no parameter 'topk'; it has top_k"),
        (["x"], {"top_k": 0}, "'top_k' must be a whole number from 1"),
        (["x"], {"top_k": True}, "'top_k' must be"),
        (["x"], {"truncation": "yes"}, "true or false"),
        (["x"], {"function_to_apply": "tanh"}, "one of 'sigmoid'"),
    ],
)
def test_what_a_classifier_cannot_use_is_the_callers_mistake(
    inputs: list[Any], parameters: Mapping[str, Any], reason: str, workshop: Workshop
) -> None:
    agent = workshop.agent(workshop.bert("ForSequenceClassification"), "text-classification")
    with pytest.raises(BadInput, match=reason):
        agent.predict(inputs, parameters)


@pytest.mark.parametrize(
    ("kind", "task", "text", "parameters", "reason"),
    [
        ("ForMaskedLM", "fill-mask", "no mask", {}, r"must have the mask '\[MASK\]'"),
        ("ForMaskedLM", "fill-mask", "[MASK]", {"top_k": 1000}, "more than the"),
        ("ForTokenClassification", "token-classification", "a", {"stride": 64}, "stride"),
        ("ForTokenClassification", "token-classification", "a " * 100, {"stride": 32}, "'stride' must be at most 31"),
        ("ForTokenClassification", "token-classification", "a " * 20_000, {"stride": 31}, "rows .* may make 256"),
        ("ForTokenClassification", "token-classification", "a" * ((1 << 20) + 1), {"truncation": True}, "may have 1048576"),
        ("ForTokenClassification", "token-classification", "a", {"stride": 2, "aggregation_strategy": "none"}, "stride"),
    ],
)
def test_what_other_tasks_cannot_use_is_the_callers_mistake(
    kind: str, task: str, text: str, parameters: Mapping[str, Any], reason: str, workshop: Workshop
) -> None:
    agent = workshop.agent(workshop.bert(kind), task)
    with pytest.raises(BadInput, match=reason):
        agent.predict([text], parameters)


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({}, "candidate_labels"),
        ({"candidate_labels": []}, "candidate_labels"),
        ({"candidate_labels": ["a"], "hypothesis_template": "{0.x}"}, "braces"),
        ({"candidate_labels": ["a"] * 257}, "257 rows .* may make 256"),
        ({"candidate_labels": ["a" * 1000], "hypothesis_template": "{}" * 2000}, "2004000 characters, and may have 1048576"),
    ],
)
def test_labels_that_are_none_are_the_callers_mistake(parameters: Mapping[str, Any], reason: str, workshop: Workshop) -> None:
    agent = workshop.agent(workshop.bert("ForSequenceClassification", ("contradiction", "entailment")), "zero-shot-classification")
    with pytest.raises(BadInput, match=reason):
        agent.predict(["a"], parameters)


@pytest.mark.parametrize(
    ("context", "parameters", "reason"),
    [
        ("a " * 100, {"doc_stride": 30}, "'doc_stride' must be at most 29"),
        ("a " * 12_000, {}, "rows .* may make 256"),
        ("a", {"max_seq_len": 5000}, "from 1 to 4096"),
    ],
)
def test_a_context_is_cut_into_so_many_pieces_at_most(context: str, parameters: Mapping[str, Any], reason: str, workshop: Workshop) -> None:
    agent = workshop.agent(workshop.bert("ForQuestionAnswering", ("start", "end")), "question-answering")
    with pytest.raises(BadInput, match=reason):
        agent.predict([{"question": "who ?", "context": context}], parameters)


def test_labels_of_all_inputs_together_are_bounded(workshop: Workshop) -> None:
    agent = workshop.agent(workshop.bert("ForSequenceClassification", ("contradiction", "entailment")), "zero-shot-classification")
    with pytest.raises(BadInput, match="more than 1024 rows together"):
        agent.predict(["a"] * 5, {"candidate_labels": ["a"] * 256})


# Batches


def counted(agent: Any) -> Callable[[], list[tuple[int, ...]]]:
    """The shapes of what the model is given from now on."""
    shapes: list[tuple[int, ...]] = []
    agent._task.model.register_forward_pre_hook(lambda _, __, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True)
    return lambda: shapes


def test_a_batch_is_one_forward_pass_without_padding(workshop: Workshop) -> None:
    agent = workshop.agent(workshop.bert("ForSequenceClassification"), "text-classification")
    shapes = counted(agent)
    agent.predict(TEXTS, {})
    assert shapes() == [(1, sum(len(workshop.tokenizer(text)["input_ids"]) for text in TEXTS))]


def test_texts_that_cannot_be_packed_are_padded(workshop: Workshop) -> None:
    torch.manual_seed(7)
    config = workshop.library.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, n_positions=LIMIT, vocab_size=len(VOCABULARY), pad_token_id=0, bos_token_id=2, eos_token_id=3
    )
    folder = workshop.save("gpt2-padded", workshop.library.GPT2ForSequenceClassification(config), workshop.tokenizer)
    agent = workshop.agent(folder)
    shapes = counted(agent)
    theirs = workshop.library.pipeline("text-classification", model=str(folder), device="cpu")
    assert_alike(agent.predict(TEXTS, {}), theirs(TEXTS))
    assert shapes() == [(3, max(len(workshop.tokenizer(text)["input_ids"]) for text in TEXTS))]


def test_texts_of_a_model_that_does_not_mask_share_a_pass_only_with_those_of_their_length(workshop: Workshop) -> None:
    torch.manual_seed(5)
    config = workshop.library.FNetConfig(
        hidden_size=16,
        num_hidden_layers=1,
        intermediate_size=16,
        vocab_size=len(VOCABULARY),
        max_position_embeddings=LIMIT,
        initializer_range=0.5,
    )
    folder = workshop.save("fnet", workshop.library.FNetForSequenceClassification(config), workshop.tokenizer)
    agent = workshop.agent(folder)
    theirs = workshop.library.pipeline("text-classification", model=str(folder), device="cpu")
    texts = [*TEXTS, "the dog reads"]
    assert_alike(agent.predict(texts, {}), theirs(texts))


def test_a_model_without_a_token_to_pad_with_answers_all_the_same(workshop: Workshop) -> None:
    torch.manual_seed(6)
    tokens = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = workshop.library.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=LIMIT, vocab_size=len(VOCABULARY), **tokens)
    tokenizer = workshop.library.BertTokenizerFast.from_pretrained(workshop.bert("Model"), pad_token=None)
    folder = workshop.save("gpt2", workshop.library.GPT2ForSequenceClassification(config), tokenizer)
    agent = workshop.agent(folder)
    theirs = workshop.library.pipeline("text-classification", model=str(folder), device="cpu")
    assert_alike(agent.predict(TEXTS, {}), [theirs(text)[0] for text in TEXTS])


def test_the_size_of_an_input_is_is_its_length(workshop: Workshop) -> None:
    agent = workshop.agent(workshop.bert("ForSequenceClassification"), "text-classification")
    assert agent.size("abcd") == 4
    assert agent.size({"text": "ab", "text_pair": "cd"}) == 4


# Served


@pytest.fixture(scope="module")
def server(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    model = workshop.bert("ForSequenceClassification")
    fill_cache(folder / "cache", URI, {path.name: path.read_bytes() for path in model.iterdir()})
    port = free_port()
    settings = {"FUNCTION_AGENT": "function.agents.transformers:Pipeline", "FUNCTION_HOST": "127.0.0.1", "PORT": str(port)}
    env = clean_environment(**settings, WEIGHTS_URI=URI, WEIGHTS_CACHE_DIR=str(folder / "cache"))
    with running([sys.executable, "-m", "function"], folder / "log", env, port) as server:
        yield server.ready()


def test_all_routes_have_the_answers_and_errors(server: Server, workshop: Workshop) -> None:
    theirs = workshop.library.pipeline("text-classification", model=str(workshop.bert("ForSequenceClassification")), device="cpu")
    v1 = request(server.port, "POST", "/v1/models/model:predict", {"instances": TEXTS, "parameters": {"top_k": 2}})
    assert_alike(v1.json()["predictions"], theirs(TEXTS, top_k=2))
    plain = request(server.port, "POST", "/", {"instances": [{"text": "the cat", "text_pair": "a dog"}]})
    assert_alike(plain.json()["predictions"], theirs([{"text": "the cat", "text_pair": "a dog"}]))
    tensor = {"name": "input", "datatype": "BYTES", "shape": [3], "data": TEXTS}
    v2 = request(server.port, "POST", "/v2/models/model/infer", {"inputs": [tensor]})
    (output,) = v2.json()["outputs"]
    assert_alike([json.loads(one) for one in output["data"]], theirs(TEXTS))
    assert v2.json()["outputs"][0]["shape"] == [3]
    for body, reason in (
        ({"instances": ["x"], "parameters": {"topk": 1}}, "no parameter 'topk'"),
        ({"instances": ["cat " * 70]}, "the model takes 64"),
        ({"instances": [1]}, "must be a string"),
    ):
        refused = request(server.port, "POST", "/v1/models/model:predict", body)
        assert (refused.status, reason in str(refused.json())) == (400, True)
    assert "Traceback" not in server.said()


def pss_of_two(folder: Path, model: Path) -> int:
    """Bytes of two replicas of a model, each of which has answered; pages that both use are counted once."""
    fill_cache(folder / "cache", URI, {path.name: path.read_bytes() for path in model.iterdir()})
    with ExitStack() as replicas:
        total = 0
        servers = []
        for number in range(2):
            port = free_port()
            settings = {"FUNCTION_AGENT": "function.agents.transformers:Pipeline", "FUNCTION_HOST": "127.0.0.1", "PORT": str(port)}
            env = clean_environment(**settings, WEIGHTS_URI=URI, WEIGHTS_CACHE_DIR=str(folder / "cache"))
            servers.append(replicas.enter_context(running([sys.executable, "-m", "function"], folder / f"log-{number}", env, port)).ready())
        for server in servers:
            assert request(server.port, "POST", "/", {"instances": TEXTS}).status == 200
        for server in servers:
            for pid in (server.process.pid, *map(int, children_of(server.process.pid))):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def children_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.soak
def test_two_replicas_share_the_weights(workshop: Workshop, tmp_path: Path) -> None:
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    config = workshop.library.BertConfig(**sizes, vocab_size=len(VOCABULARY), max_position_embeddings=LIMIT)
    large = workshop.save("large", workshop.library.BertForSequenceClassification(config), workshop.tokenizer)
    weights = (large / "model.safetensors").stat().st_size
    assert weights > 300e6  # so that what else a process needs for larger tensors is little beside them
    (tmp_path / "large").mkdir()
    (tmp_path / "small").mkdir()
    without = pss_of_two(tmp_path / "small", workshop.bert("ForSequenceClassification"))
    found = pss_of_two(tmp_path / "large", large)
    print(f"PSS of two: {found / 1e6:.0f} MB, {without / 1e6:.0f} MB without the weights of {weights / 1e6:.0f} MB")
    assert found <= without + 1.1 * weights, f"{found / 1e6:.0f} MB, {without / 1e6:.0f} MB without weights of {weights / 1e6:.0f} MB"
