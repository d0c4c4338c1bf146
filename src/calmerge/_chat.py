"""Chat templates: which one the merged model carries."""

from collections import Counter
from collections.abc import Mapping

from calmerge._errors import CheckpointError, UsageError, did_you_mean
from calmerge._side_files import as_json, json_file, side_file, with_edits
from calmerge._weights import Weights

BUILT_IN = {
    "alpaca": (
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'assistant' %}{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}\n"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}\n"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + "
        "'<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
        "{% else %}{{ raise_exception('Only the roles user and assistant are known.') }}{% endif %}{% endfor %}"
    ),
    "exaone": (
        "{% for message in messages %}{{ '[|' + message['role'] + '|]' + message['content'] }}"
        "{% if message['role'] != 'user' %}{{ '[|endofturn|]' }}{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
    ),
}  # fmt: skip


def check_template(text: str) -> None:
    """Refuses what is neither `auto`, nor the name of a template, nor one written in Jinja.

    >>> check_template("chatmll")
    Traceback (most recent call last):
    calmerge._errors.UsageError: no chat template is called 'chatmll'. Did you mean 'chatml'?
    """
    if text != "auto" and text not in BUILT_IN and "{" not in text:
        raise UsageError(f"no chat template is called '{text}'. {did_you_mean(text, ['auto', *BUILT_IN])}")


def with_template(models: Mapping[str, Weights], wanted: str) -> dict[str, Weights]:
    """The models with one chat template: a built-in one, one in Jinja, or the most frequent of theirs (`auto`)."""
    check_template(wanted)
    if wanted == "auto":
        votes = Counter(found for weights in models.values() if (found := template_of(weights)))
        if not votes:
            raise CheckpointError("chat_template: auto, but no model of this merge has one. Name one, such as chatml.")
        wanted = max(votes, key=votes.__getitem__)  # of equally many the first one
    text = BUILT_IN.get(wanted, wanted)
    return {key: _with(weights, text) for key, weights in models.items()}


def template_of(weights: Weights) -> str | None:
    """The chat template that lies beside a model, if there is one."""
    own = side_file(weights, "chat_template.jinja")
    if own is not None:
        return own.decode()
    found = json_file(weights, "tokenizer_config.json").get("chat_template")
    return found if isinstance(found, str) else None


def _with(weights: Weights, text: str) -> Weights:
    settings = json_file(weights, "tokenizer_config.json")
    edits: dict[str, bytes | None] = {"chat_template.jinja": text.encode(), "chat_template.json": None}
    if "chat_template" in settings:
        edits["tokenizer_config.json"] = as_json({key: v for key, v in settings.items() if key != "chat_template"})
    return with_edits(weights, edits)
