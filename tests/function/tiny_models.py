"""Language models of transformers that are made in the test: random ones, and one that recites a text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{%- if tools %}<|im_start|>system\nTools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n"
    'Write <tool_call>{"name": …, "arguments": …}</tool_call> to call one.<|im_end|>\n{% endif -%}'
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function.arguments | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(**more: Any) -> Any:
    """Byte-level BPE of 400 tokens, so that any text can be written, characters spread over tokens."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    found.train_from_iterator(["the quick brown fox jumps over the lazy dog and says hello to the world"] * 9, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=found, eos_token="<|im_end|>", pad_token="<|endoftext|>", **more)


SIZES = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 256}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}


def make_model(kind: str, seed: int = 0) -> Any:
    """A random one, wild enough that its texts differ. Windows of attention are 8 tokens."""
    t = transformers
    torch.manual_seed(seed)
    made: Any
    match kind:
        case "llama":
            made = t.LlamaForCausalLM(t.LlamaConfig(**SIZES, **HEADS))
        case "gpt2":
            made = t.GPT2LMHeadModel(t.GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=256))
        case "qwen2":
            more = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
            made = t.Qwen2ForCausalLM(t.Qwen2Config(**SIZES, **HEADS, **more))
        case "mistral":
            made = t.MistralForCausalLM(t.MistralConfig(**SIZES, **HEADS, sliding_window=8))
        case "gpt_neo":
            neo: dict[str, Any] = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8}
            made = t.GPTNeoForCausalLM(t.GPTNeoConfig(vocab_size=400, hidden_size=32, max_position_embeddings=256, **neo))
        case "bloom":
            made = t.BloomForCausalLM(t.BloomConfig(vocab_size=400, hidden_size=32, n_layer=2, n_head=4))
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    made.generation_config.eos_token_id = made.generation_config.bos_token_id = None
    return made.eval()


def make_reciter(tokens: Sequence[int]) -> Any:
    """Whatever it is told, the token after position p is tokens[p]."""
    places = len(tokens)
    made = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=400, n_embd=places, n_layer=1, n_head=1, n_inner=4, n_positions=places, tie_word_embeddings=False
        )
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
        made.transformer.ln_f.weight.fill_(6 / places**0.5)  # its logit is 6, those of others 0: what is drawn differs
        made.transformer.wpe.weight.copy_(torch.eye(places))
        made.lm_head.weight[torch.tensor(tokens), torch.arange(places)] = 1.0
    return made.eval()


def save(folder: Path, model: Any, tokenizer: Any) -> dict[str, bytes]:
    """The files of both."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
