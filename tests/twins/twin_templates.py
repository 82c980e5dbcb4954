"""Chat templates of the twins, written here in the structure of the real ones.

The same turn markers, the same place of images, and the same demands on a message's content: some
take a list of parts only, some a string only in certain roles, and print a list as Python would.
Sentences that a real template adds (a system message, say) are replaced by our own.
"""

from __future__ import annotations

# Loops over parts: a string has none, and vanishes without a word.
LLAVA = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role | upper }}: {% endif %}"
    "{% for p in m.content if p.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for p in m.content if p.type == 'text' %}{{ p.text }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

# A system message and an answer are lists, of which the first part counts.
LLAVA_MISTRAL = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ '<<SYS>>\n' + m.content[0].text + '\n<</SYS>>\n\n' }}"
    "{% elif m.role == 'user' %}[INST] "
    "{% for p in m.content if p.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %} [/INST]"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content[0].text + '</s> ' }}"
    "{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
)

ONEVISION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% for p in m.content if p.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for p in m.content if p.type == 'video' %}{{ '<video>\n' }}{% endfor %}"
    "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_QWEN_PARTS = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' or 'image' in p or 'image_url' in p %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif p.type == 'video' or 'video' in p %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in p %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
)
QWEN2 = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nYou are an assistant that looks at pictures.<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' }}" + _QWEN_PARTS + "{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}" + _QWEN_PARTS + ""
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

INTERNVL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif p.type == 'video' %}"
    "{{ '<video>\n' }}{% elif p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# One line per message; the space after the colon depends on the first part.
_IDEFICS = (
    "{% for m in messages %}{{ m.role | capitalize }}"
    "{% if m.content[0].type == 'image' %}:{% else %}{{ ': ' }}{% endif %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
    "{% elif p.type == 'image' %}<image>{% endif %}{% endfor %}{{ '<end_of_utterance>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
SMOLVLM = "<|im_start|>" + _IDEFICS
IDEFICS3 = "<|begin_of_text|>" + _IDEFICS

GRANITE = (
    "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }}{% elif p.type == 'image' %}<image>{% endif %}"
    "{% endfor %}{% endif %}{{ '<|end_of_text|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)

# The system message is added to a string, before the last question.
PIXTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{% if loop.last and system is defined %}"
    "{{ '[INST]' + system + '\n\n' }}{% else %}[INST]{% endif %}{% endif %}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }}{% elif p.type == 'image' %}[IMG]"
    "{% else %}{{ raise_exception('no such part') }}{% endif %}{% endfor %}{% endif %}"
    "{% if m.role == 'user' %}[/INST]{% else %}{{ eos_token }}{% endif %}{% endfor %}"
)

MISTRAL_SMALL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% if messages[0].content is string %}{% set system = messages[0].content %}"
    "{% else %}{% set system = messages[0].content[0].text %}{% endif %}"
    "{% set turns = messages[1:] %}{% else %}"
    "{% set system = 'Today is ' + strftime_now('%Y-%m-%d') + '. Answer briefly.\n' %}"
    "{% set turns = messages %}{% endif %}[SYSTEM_PROMPT]{{ system }}[/SYSTEM_PROMPT]"
    "{% for m in turns %}{% if m.role == 'user' %}{% if m.content is string %}"
    "[INST]{{ m.content }}[/INST]{% else %}[INST]{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }}{% elif p.type in ('image', 'image_url') %}[IMG]"
    "{% else %}{{ raise_exception('no such part') }}{% endif %}{% endfor %}[/INST]{% endif %}"
    "{% elif m.role == 'assistant' %}{% if m.content is string %}{{ m.content + eos_token }}"
    "{% else %}{{ m.content[0].text + eos_token }}{% endif %}"
    "{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
)

# Contents of the system and the assistant are printed as they are: a list as Python writes it.
GLM = (
    "[gMASK]<sop>{% for m in messages %}{% if m.role == 'system' %}"
    "{{ '<|system|>\n' }}{{ m.content }}{% elif m.role == 'user' %}{{ '<|user|>\n' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'video' or 'video' in p %}<|begin_of_video|><|video|><|end_of_video|>"
    "{% elif p.type == 'image' or 'image' in p %}<|begin_of_image|><|image|><|end_of_image|>"
    "{% elif p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "{% elif m.role == 'assistant' %}{{ '<|assistant|>\n' }}{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

# The system message stands before the first question; the assistant is called model.
GEMMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% if messages[0].content is string %}{% set first = messages[0].content + '\n\n' %}"
    "{% else %}{% set first = messages[0].content[0].text + '\n\n' %}{% endif %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}"
    "{% endif %}{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}"
    "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<start_of_image>{% elif p.type == 'text' %}{{ p.text | trim }}"
    "{% endif %}{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

_QWEN35_TEXT = (
    "{% macro said(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for p in content %}{% if p.type == 'image' or 'image' in p %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in p %}{{ p.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endmacro %}"
)
# Contents are trimmed, and the answer begins with a thought.
QWEN35 = (
    _QWEN35_TEXT + "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('the system message comes first') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + (said(m.content) | trim) + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)

GEMMA4 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}{{ '<|turn>' + role + '\n' }}"
    "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}{{ '\n\n<|image|>\n\n' }}{% elif p.type == 'text' %}"
    "{{ p.text | trim }}{% endif %}{% endfor %}{% endif %}{{ '<turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"
)
