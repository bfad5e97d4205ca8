"""What chat templates of the large families put around a prompt, with and without a system role."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from cotrain.errors import TeacherError
from cotrain.teacher.chat import chat_frame
from cotrain.teacher.prompts import PromptBuilder
from cotrain.teacher.templates import load_template

SYSTEM = "Rank well."


@dataclass(frozen=True)
class Family:
    """A chat template, its control tokens, and what is expected around the user's text."""

    template: str
    controls: tuple[str, ...]
    head: str
    tail: str
    bos: str = "<s>"


FAMILIES = {
    "llama 3": Family(
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
        "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
        "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nRank well.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        bos="<|begin_of_text|>",
    ),
    "llama 3.2, with today's date": Family(
        "{{- bos_token }}{%- if not date_string is defined %}"
        "{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
        "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
        "{%- if messages[0]['role'] == 'system' %}"
        "{%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}"
        "{%- else %}{%- set system_message = '' %}{%- endif %}"
        "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
        "{{- 'Cutting Knowledge Date: December 2023\n' }}"
        "{{- 'Today Date: ' + date_string + '\n\n' }}{{- system_message }}{{- '<|eot_id|>' }}"
        "{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + "
        "'<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 2024-07-26\n\nRank well.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        bos="<|begin_of_text|>",
    ),
    "mistral, strict alternation": Family(
        "{{ bos_token }}{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
        "{% endfor %}",
        ("[INST]", "[/INST]"),
        "<s>[INST] Rank well.\n\n",
        " [/INST]",
    ),
    "mistral small, with today's date": Family(
        "{%- set today = strftime_now('%Y-%m-%d') %}{{- bos_token }}"
        "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
        "{%- set messages = messages[1:] %}{%- else %}{%- set system = 'Today is ' + today %}"
        "{%- endif %}{{- '[SYSTEM_PROMPT]' + system + ' ' + today + '[/SYSTEM_PROMPT]' }}"
        "{%- for message in messages %}{{- '[INST]' + message['content'] + '[/INST]' }}"
        "{%- endfor %}",
        ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
        "<s>[SYSTEM_PROMPT]Rank well. 2024-07-26[/SYSTEM_PROMPT][INST]",
        "[/INST]",
    ),
    "gemma 2, refuses": Family(
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
        "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
        "{% set role = message['role'] %}{% endif %}"
        "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"),
        "<bos><start_of_turn>user\nRank well.\n\n",
        "<end_of_turn>\n<start_of_turn>model\n",
        bos="<bos>",
    ),
    "gemma 3, merges by itself": Family(
        "{{ bos_token }}\n{%- if messages[0]['role'] == 'system' -%}\n"
        "    {%- if messages[0]['content'] is string -%}\n"
        "        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}\n"
        "    {%- else -%}\n"
        "        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}\n"
        "    {%- endif -%}\n    {%- set loop_messages = messages[1:] -%}\n{%- else -%}\n"
        "    {%- set first_user_prefix = '' -%}\n    {%- set loop_messages = messages -%}\n"
        "{%- endif -%}\n{%- for message in loop_messages -%}\n"
        "    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}\n"
        "    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}\n"
        "    {%- if message['content'] is string -%}\n        {{ message['content'] | trim }}\n"
        "    {%- endif -%}\n    {{ '<end_of_turn>\n' }}\n{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}\n    {{'<start_of_turn>model\n'}}\n{%- endif -%}",
        ("<start_of_turn>", "<end_of_turn>"),
        "<bos><start_of_turn>user\nRank well.\n\n",
        "<end_of_turn>\n<start_of_turn>model\n",
        bos="<bos>",
    ),
    "qwen 2": Family(
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_start|>system\nRank well.<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen 3, told not to think": Family(
        "{%- for message in messages %}{%- if message.content is string %}"
        "{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}"
        "{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}"
        "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}",
        ("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
        "<|im_start|>system\nRank well.<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "deepseek r1, always thinks": Family(
        "{% set ns = namespace(is_first=false, system_prompt='') %}"
        "{%- for message in messages %}{%- if message['role'] == 'system' %}"
        "{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}"
        "{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}"
        "{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}"
        "{%- endfor -%}{% if add_generation_prompt %}{{'<｜Assistant｜><think>\n'}}{% endif %}",
        ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        "<｜begin▁of▁sentence｜>Rank well.<｜User｜>",
        "<｜Assistant｜><think>\n\n</think>\n\n",
        bos="<｜begin▁of▁sentence｜>",
    ),
    "opens a channel of thoughts": Family(
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|turn>' + message['role'] + '\n' + message['content'] + '<turn|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|turn>model\n<|channel>thought' }}{% endif %}",
        ("<|turn>", "<turn|>", "<|channel>", "<channel|>"),
        "<bos><|turn>system\nRank well.<turn|>\n<|turn>user\n",
        "<turn|>\n<|turn>model\n<|channel>thought\n\n<channel|>\n\n",
        bos="<bos>",
    ),
    "phi 3": Family(
        "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
        "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}"
        "{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
        "{% elif message['role'] == 'assistant' %}"
        "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|system|>\nRank well.<|end|>\n<|user|>\n",
        "<|end|>\n<|assistant|>\n",
    ),
    "drops the system message": Family(
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '### User:\n' + message['content'] + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}",
        (),
        "### User:\nRank well.\n\n",
        "\n\n### Assistant:\n",
    ),
}


def with_chat(
    tokenizer: PreTrainedTokenizerBase, template: str, controls: tuple[str, ...] = (), bos="<s>"
) -> PreTrainedTokenizerBase:
    """The tokenizer with another chat template and the control tokens that it uses."""
    changed: Any = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"bos_token": bos, "additional_special_tokens": list(controls)})
    changed.chat_template = template
    return changed


def of_family(tokenizer: PreTrainedTokenizerBase, family: Family) -> PreTrainedTokenizerBase:
    return with_chat(tokenizer, family.template, family.controls, family.bos)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_frame_of_each_family(tokenizer, family: Family):
    assert chat_frame(of_family(tokenizer, family), SYSTEM) == (family.head, family.tail)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_without_a_system_message_only_the_user_speaks(tokenizer, family: Family):
    head, tail = chat_frame(of_family(tokenizer, family), "")
    assert tail == family.tail
    assert "Rank well." not in head
    assert not head.endswith("\n\n\n")


@pytest.mark.parametrize("mode", ["direct", "cot"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_prompts_of_each_family(tokenizer, family: Family, mode):
    """They read as the family's own rendering, control tokens whole, up to the answer prefix."""
    chat = of_family(tokenizer, family)
    titles = ["", "Heat", "Ran", "<|im_end|><think>[INST]", "</s>"]
    prompts = PromptBuilder(
        chat, titles, ["", "Crime", "", "Drama", ""], template=load_template("default"),
        num_shown=3, mode=mode, history_length=10, max_title_tokens=32, max_context_tokens=4096,
    )  # fmt: skip
    prompt = prompts.build([1, 3, 2], [4, 2, 1])
    text = str(chat.decode(prompt))
    system = "You are the ranking component of a recommender system."
    head, user = family.head.replace("Rank well.", system), load_template("default").user
    assert text.startswith(head + "Below are the last choices")
    assert text.startswith(str(chat.decode(prompts.prefix)))
    assert str(chat.decode(prompts.prefix)).endswith(user.partition("{history}")[0][-20:])
    opening = "This user" if mode == "cot" else "Ranking: ["
    assert text.endswith(f"[C] Heat | Crime{family.tail}{opening}")
    assert chat.decode(prompts.answer) == ("\nRanking: [" if mode == "cot" else "")
    # Each control token is one token, and stands only where the chat template put it.
    assert prompt == chat.encode(text, add_special_tokens=False)
    vocabulary = chat.get_vocab()  # pyright: ignore
    for control in (*family.controls, family.bos):
        if len(chat.encode(control, add_special_tokens=False)) == 1:
            assert prompt.count(vocabulary[control]) == (head + family.tail).count(control)
    assert len(prompts.identifiers.first_tokens) == 3


def test_without_a_chat_template_it_is_plain_text(tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    assert chat_frame(plain, SYSTEM) == ("Rank well.\n\n", "\n")
    assert chat_frame(plain, "") == ("", "\n")


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        ("<a><think>", "<a><think>\n\n</think>\n\n"),
        ("<a><think>\n\n", "<a><think>\n\n</think>\n\n"),
        ("<a>[THINK]", "<a>[THINK]\n\n[/THINK]\n\n"),
        ("<a><think></think>", "<a><think></think>"),
        ("<a><think>x</think>\n<think>", "<a><think>x</think>\n<think>\n\n</think>\n\n"),
        ("<a></think>", "<a></think>"),
        ("<a>thinking", "<a>thinking"),
    ],
)
def test_open_blocks_of_thoughts_are_closed(tokenizer, tail, expected):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '" + tail + "' }}"
    template = template.replace("\n", "\\n")
    assert chat_frame(with_chat(tokenizer, template), "")[1] == expected


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('No users here') }}", "cannot render a single user message: No users"),
        ("{{ messages[1]['content'] + '' }}", "cannot render a single user message"),
        ("{% if nonsense", "cannot render a single user message"),
        ("hello", "0 times; expected once"),
        ("{{ messages[-1].content }} {{ messages[-1].content }}", "2 times; expected once"),
    ],
)
def test_chat_templates_that_cannot_serve_are_told(tokenizer, template, said):
    for system in ("", SYSTEM):
        with pytest.raises(TeacherError, match="The chat template of the teacher") as caught:
            chat_frame(with_chat(tokenizer, template), system)
        assert said in str(caught.value)
        assert "teacher.model" in str(caught.value)
