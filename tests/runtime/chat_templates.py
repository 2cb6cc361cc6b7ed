"""Chat templates in the manner of the published families, in our own words, and chats for them."""

from __future__ import annotations

from typing import Any, Final

TEMPLATES: Final[dict[str, str]] = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>'"
        " + '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama-2": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
        "{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}"
        "{% set system = false %}{% endif %}{% for m in rest %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('turns must alternate') }}{% endif %}"
        "{% if loop.index0 == 0 and system != false %}"
        "{% set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}"
        "{% else %}{% set text = m['content'] %}{% endif %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "llama-3.1": """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Today: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- system }}{{- "<|eot_id|>" }}
{%- for m in messages %}
    {%- if 'tool_calls' in m %}
        {%- if m.tool_calls | length != 1 %}{{- raise_exception("one call at a time") }}{%- endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", ' }}
        {{- '"parameters": ' }}{{- call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- elif m.role == "tool" or m.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if m.content is mapping or m.content is iterable %}{{- m.content | tojson }}
        {%- else %}{{- m.content }}{%- endif %}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim }}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "mistral-v1": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
        "{{ m['content'] + eos_token + ' ' }}{% else %}"
        "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
        "{% endfor %}"
    ),
    "mistral-v3": """{%- if messages[0]["role"] == "system" %}
    {%- set system = messages[0]["content"] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set users = turns | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{{- bos_token }}
{%- for m in turns %}
    {%- if m["role"] == "user" %}
        {%- if tools is not none and (m == users[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val|tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system is defined %}
            {{- "[INST] " + system + "\\n\\n" + m["content"] + "[/INST]" }}
        {%- else %}{{- "[INST] " + m["content"] + "[/INST]" }}{%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- elif m.tool_calls is defined and m.tool_calls is not none %}
        {{- "[TOOL_CALLS] " }}{{- m.tool_calls | map(attribute="function") | list | tojson }}
        {{- eos_token }}
    {%- elif m["role"] == "assistant" %}{{- " " + m["content"]|trim + eos_token }}
    {%- elif m["role"] in ["tool", "tool_results"] %}
        {{- "[TOOL_RESULTS] " + (m.content | string) + "[/TOOL_RESULTS]" }}
    {%- else %}{{- raise_exception("no role " + m["role"]) }}{%- endif %}
{%- endfor %}
""",
    "mistral-tekken": """{%- set today = strftime_now("%Y-%m-%d") %}
{{- bos_token }}
{%- if messages[0]['role'] != 'system' %}
[SYSTEM_PROMPT]You answer. Today is {{ today }}.[/SYSTEM_PROMPT]
{%- endif %}
{%- for m in messages %}
    {%- if m['role'] == 'system' %}[SYSTEM_PROMPT]{{ m['content'] }}[/SYSTEM_PROMPT]
    {%- elif m['role'] == 'user' %}
        {%- if m['content'] is string %}{{- '[INST]' + m['content'] + '[/INST]' }}
        {%- else %}{{- '[INST]' }}
            {%- for part in m['content'] %}
                {%- if part['type'] == 'text' %}{{- part['text'] }}{%- endif %}
                {%- if part['type'] in ['image', 'image_url'] %}{{- '[IMG]' }}{%- endif %}
            {%- endfor %}{{- '[/INST]' }}
        {%- endif %}
    {%- elif m['role'] == 'assistant' %}{{- m['content'] + eos_token }}{%- endif %}
{%- endfor %}
""",
    "gemma-2": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
    ),
    "gemma-3": """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first = messages[0]['content'] + '\n\n' -%}
    {%- else -%}{%- set first = messages[0]['content'][0]['text'] + '\n\n' -%}{%- endif -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set first = "" -%}{%- set turns = messages -%}
{%- endif -%}
{%- for m in turns -%}
    {{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}
    {{- first if loop.first else "" -}}
    {%- if m['content'] is string -%}{{ m['content'] | trim }}
    {%- elif m['content'] is iterable -%}
        {%- for item in m['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
""",
    "phi-3": (
        "{% for m in messages %}{% if m['role'] == 'system' and m['content'] %}"
        "{{'<|system|>\n' + m['content'] + '<|end|>\n'}}{% elif m['role'] == 'user' %}"
        "{{'<|user|>\n' + m['content'] + '<|end|>\n'}}{% elif m['role'] == 'assistant' %}"
        "{{'<|assistant|>\n' + m['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "phi-4-mini": (
        "{% for m in messages %}{% if m['role'] == 'system' and 'tools' in m and "
        "m['tools'] is not none %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|tool|>' + "
        "m['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}"
        "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "qwen-2.5": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}
    {%- else %}{{- 'You are helpful.' }}{%- endif %}
    {{- "\\n\\n# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == "user" or (m.role == "assistant" and not m.tool_calls) %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}
    {%- elif m.role == "assistant" %}
        {{- '<|im_start|>' + m.role }}
        {%- if m.content %}{{- '\\n' + m.content }}{%- endif %}
        {%- for call in m.tool_calls %}
            {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- call.name }}{{- '", "arguments": ' }}
            {{- call.arguments | tojson }}{{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- m.content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""",
    "qwen-3": """{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for m in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and m.role == "user" and m.content is string and
           not (m.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.content is string %}{%- set content = m.content %}
    {%- else %}{%- set content = '' %}{%- endif %}
    {%- if m.role == "assistant" %}
        {%- set thought = '' %}
        {%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content + '<|im_end|>\\n' }}
    {%- else %}{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>' + '\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
""",
    "deepseek-r1": (
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
        "{% endif %}{% set ns = namespace(system='', is_first=true) %}{%- for m in messages %}"
        "{%- if m['role'] == 'system' %}{%- set ns.system = ns.system + m['content'] %}{%- endif %}"
        "{%- endfor %}{{ bos_token }}{{ ns.system }}{%- for m in messages %}"
        "{%- if m['role'] == 'user' %}{{ '<\uff5cUser\uff5c>' + m['content'] }}{%- endif %}"
        "{%- if m['role'] == 'assistant' and m['content'] is not none %}"
        "{% set content = m['content'] %}{% if '</think>' in content %}"
        "{% set content = content.split('</think>')[-1] %}{% endif %}"
        "{{ '<\uff5cAssistant\uff5c>' + content + '<\uff5cend\u2581of\u2581sentence\uff5c>' }}"
        "{%- endif %}{%- endfor %}{% if add_generation_prompt %}"
        "{{ '<\uff5cAssistant\uff5c><think>\\n' }}{% endif %}"
    ),
    "command-r": (
        "{{ bos_token }}{% if documents %}{{ '<|SYSTEM|># Documents' }}{% for d in documents %}"
        "{{ '\nDocument: ' ~ loop.index0 ~ '\n' }}{% for key, value in d.items() %}"
        "{{ key }}: {{ value }}\n{% endfor %}{% endfor %}{% endif %}"
        "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
        "{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
        "{% set system = false %}{% endif %}{% if system != false %}"
        "{{ '<|START|><|SYSTEM|>' + system + '<|END|>' }}{% endif %}{% for m in loop_messages %}"
        "{% set content = m['content'] %}{% if m['role'] == 'user' %}"
        "{{ '<|START|><|USER|>' + content.strip() + '<|END|>' }}{% elif m['role'] == 'assistant' %}"
        "{{ '<|START|><|CHATBOT|>' + content.strip() + '<|END|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|START|><|CHATBOT|>' }}{% endif %}"
    ),
    "zephyr": """{% for m in messages %}
{% if m['role'] == 'user' %}
{{ '<|user|>\\n' + m['content'] + eos_token }}
{% elif m['role'] == 'system' %}
{{ '<|system|>\\n' + m['content'] + eos_token }}
{% elif m['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + m['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "smollm-2": (
        "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a small model<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "smollm-3": """{#- defaults -#}
{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}
{%- set mode = "/think" if enable_thinking else "/no_think" -%}
{%- if messages[0].role == "system" -%}
    {%- set system = messages[0].content -%}
    {%- if "/no_think" in system -%}{%- set mode = "/no_think" -%}{%- endif -%}
    {%- set told = system.replace("/no_think", "").replace("/think", "").rstrip() -%}
{%- endif -%}
{{- "<|im_start|>system\\n## Metadata\\n\\nToday Date: " ~ strftime_now("%d %B %Y") ~ "\\n" -}}
{{- "Reasoning Mode: " + mode + "\\n\\n" -}}
{%- if told -%}{{- told + "\\n" -}}{%- endif -%}
{%- if xml_tools or python_tools or tools -%}
    {{- "### Tools\\n" -}}
    {%- set ns = namespace(text="") -%}
    {%- for tool in tools -%}{%- set ns.text = ns.text ~ (tool | string) ~ "\\n" -%}{%- endfor -%}
    {{- ns.text -}}
{%- endif -%}
{{- "<|im_end|>\\n" -}}
{%- for m in messages -%}
    {%- if m.role == "user" -%}{{ "<|im_start|>user\\n" + m.content + "<|im_end|>\\n" }}
    {%- elif m.role == "assistant" -%}
        {% generation %}
        {%- if mode == "/think" -%}
            {{ "<|im_start|>assistant\\n" + m.content.lstrip("\\n") + "<|im_end|>\\n" }}
        {%- else -%}
            {{ "<|im_start|>assistant\\n<think>\\n</think>\\n" + m.content + "<|im_end|>\\n" }}
        {%- endif -%}
        {% endgeneration %}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\\n" }}{%- endif -%}
""",
    "granite": """{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}
{%- else %}
    {%- set system = "Today's Date: " + strftime_now('%B %d, %Y') + ".\\nYou are Granite." %}
    {%- if tools and documents %}{%- set system = system + " Tools and documents." %}
    {%- elif tools %}{%- set system = system + " Tools." %}
    {%- elif documents %}{%- set system = system + " Documents." %}{%- endif %}
    {%- set turns = messages %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\\n' }}
{%- if tools %}{{- '<|start_of_role|>tools<|end_of_role|>' }}
{{- tools | tojson(indent=4) }}{{- '<|end_of_text|>\\n' }}{%- endif %}
{%- if documents %}{{- '<|start_of_role|>documents<|end_of_role|>' }}
    {%- for document in documents %}
        {{- 'Document ' + loop.index0 | string + '\\n' }}{{- document['text'] }}
        {%- if not loop.last %}{{- '\\n\\n'}}{%- endif %}
    {%- endfor %}{{- '<|end_of_text|>\\n' }}
{%- endif %}
{%- for m in turns %}
    {{- '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] + '<|end_of_text|>\\n'}}
    {%- if loop.last and add_generation_prompt %}
        {{- '<|start_of_role|>assistant' }}
        {%- if controls %}{{- ' ' + controls | tojson() }}{%- endif %}{{- '<|end_of_role|>' }}
    {%- endif %}
{%- endfor %}""",
    "olmo-2": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ '<|system|>\n' + m['content'] + '\n' }}{% elif m['role'] == 'user' %}"
        "{{ '<|user|>\n' + m['content'] + '\n' }}{% elif m['role'] == 'assistant' %}"
        "{% if not loop.last %}{{ '<|assistant|>\n' + m['content'] + eos_token + '\n' }}"
        "{% else %}{{ '<|assistant|>\n' + m['content'] + eos_token }}{% endif %}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
    ),
    "yi": (
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
        "{% endif %}{% if messages[0]['role'] == 'system' %}"
        "{% set system = messages[0]['content'] %}{% endif %}{% if system is defined %}"
        "{{ system }}{% endif %}{% for m in messages %}{% set content = m['content'] %}"
        "{% if m['role'] == 'user' %}{{ '<|im_start|>user\\n' + content + '<|im_end|>\\n' + "
        "'<|im_start|>assistant\\n' }}{% elif m['role'] == 'assistant' %}"
        "{{ content + '<|im_end|>' + '\\n' }}{% endif %}{% endfor %}"
    ),
    "internlm": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] not in ['user', 'system', "
        "'assistant', 'environment'] %}{{ raise_exception('unknown role ' ~ m['role']) }}"
        "{% endif %}{{ '<|im_start|>' ~ m['role'] ~ ('' if m['name'] is not defined else "
        "' name=' ~ m['name']) ~ '\\n' ~ m['content'] ~ '<|im_end|>\\n' }}{% endfor %}"
        "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    ),
    "glm-4": """[gMASK]<sop>
{%- if tools -%}
<|system|>
# Tools
{% for tool in tools %}
{%- set function = tool.function if tool.get("function") else tool %}

## {{ function.name }}

{{ function | tojson(indent=4, ensure_ascii=False) }}
{%- endfor %}
{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'system' %}<|system|>
{{ m.content }}
{%- elif m.role == 'assistant' %}<|assistant|>
{{ (m.content | string).split('</think>') | last | trim }}
{%- else %}<|{{ 'observation' if m.role == 'tool' else m.role }}|>
{{ m.content }}
{%- endif %}
{%- endfor -%}
{%- if add_generation_prompt %}<|assistant|>{% endif %}""",
    "nemotron": (
        "{{'<extra_id_0>System'}}{% for m in messages if m['role'] == 'system' %}"
        "{{ '\n' + m['content'].strip() }}{% endfor %}{% if tools %}{{ '\n' }}"
        "{% for tool in tools %}{{ '<tool> ' + tool | tojson + ' </tool>\n' }}{% endfor %}"
        "{% endif %}{{ '\n\n' }}{% for m in messages %}{% if m['role'] == 'system' %}"
        "{% continue %}{% endif %}{{ '<extra_id_1>' + m['role'] | capitalize + '\n' + "
        "m['content'].strip() + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<extra_id_1>Assistant\n' }}{% endif %}"
    ),
    "gpt-oss": """{%- macro parameters(schema) -%}
{%- for name, spec in schema.properties.items() -%}
{{- name }}{{- "" if name in (schema.required or []) else "?" }}: {{ spec.type -}}
{{- " // " + spec.description if spec.description else "" }},
{% endfor -%}
{%- endmacro -%}
{%- if builtin_tools is not defined %}{%- set builtin_tools = [] %}{%- endif %}
{{- "<|start|>system<|message|>You are an assistant.\\nCurrent date: " }}
{{- strftime_now("%Y-%m-%d") + "\\nReasoning: " + (reasoning_effort or "medium") + "<|end|>" }}
{%- if messages[0].role in ["developer", "system"] %}
    {{- "<|start|>developer<|message|># Instructions\\n" + messages[0].content + "<|end|>" }}
    {%- set turns = messages[1:] %}
{%- else %}{%- set turns = messages %}{%- endif %}
{%- if tools %}{{- "# Tools\\nnamespace functions {\\n" }}
    {%- for tool in tools %}
        {{- "type " + tool.function.name + " = (_: {\\n" }}
        {{- parameters(tool.function.parameters) }}{{- "}) => any;\\n" }}
    {%- endfor %}{{- "}" }}
{%- endif %}
{%- for m in turns %}
    {%- if m.role == "assistant" %}
        {%- if m.thinking %}{{- "<|start|>assistant<|channel|>analysis<|message|>" + m.thinking }}
        {{- "<|end|>" }}{%- endif %}
        {{- "<|start|>assistant<|channel|>final<|message|>" + (m.content or "") + "<|return|>" }}
        {%- if m.tool_calls and loop.last %}{%- break %}{%- endif %}
    {%- else %}{{- "<|start|>" + m.role + "<|message|>" + m.content|string + "<|end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}""",
    "falcon-3": (
        "{% if tools %}{% for m in messages %}{% if m['role'] == 'system' %}{{ '<|system|>\n' }}"
        "{{ m['content'] }}{{ '\n' + tools|string }}{% endif %}{% endfor %}{% endif %}"
        "{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '<|user|>\n' + m['content'] + '\n' }}"
        "{% elif m['role'] == 'assistant' %}{{ '<|assistant|>\n' + m['content'] }}"
        "{% if not loop.last %}{{ eos_token + '\n' }}{% else %}{{ eos_token }}{% endif %}"
        "{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
        "{% endfor %}"
    ),
    "hermes-tools": """{%- macro json_to_python(spec) %}
    {%- set types = {"string": "str", "number": "float", "integer": "int", "boolean": "bool"} %}
    {%- if types[spec.type] is defined %}{{- types[spec.type] }}
    {%- elif spec.type == "array" %}{{- "list[" + json_to_python(spec["items"]) + "]" }}
    {%- else %}{{- "Any" }}{%- endif %}
{%- endmacro %}
{{- bos_token }}{{- '<|im_start|>system\\nYou may call functions: <tools> ' }}
{%- for tool in tools or [] %}
    {%- if tool.function is defined %}{%- set tool = tool.function %}{%- endif %}
    {{- '{"type": "function", "function": {"name": "' + tool.name + '", "description": "' }}
    {{- tool.name + '(' }}
    {%- for name, fields in tool.parameters.properties.items() %}
        {{- name + ": " + json_to_python(fields) }}
        {%- if not loop.last %}{{- ", " }}{%- endif %}
    {%- endfor %}
    {{- ')", "parameters": ' }}{{- tool.parameters | tojson }}{{- '}}' }}
{%- endfor %}
{{- " </tools><|im_end|>\\n" }}
{%- for m in messages %}
    {%- if m.role == "assistant" and m.tool_calls is defined %}
        {{- '<|im_start|>assistant\\n' }}
        {%- for call in m.tool_calls %}
            {{- '<tool_call>' + call.function | tojson(sort_keys=true) + '</tool_call>' }}
        {%- endfor %}{{- '<|im_end|>\\n' }}
    {%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content|string + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""",
    "named-tokens": (
        "{{ bos_token }}{{ pad_token }}{{ unk_token }}{{ image_token }}"
        "{{ sep_token is defined }}{{ tools is none }}{{ documents is none }}"
        "{% for m in messages %}{{ m | tojson(indent=1) }}{{ m.items() | list }}{% endfor %}"
    ),
    "counting": (
        "{% set counted = dict(a=1) %}{% set ns = namespace(n=0) %}{% for m in messages %}"
        "{% if loop.index > 2 %}{% break %}{% endif %}{% if not m.content %}{% continue %}"
        "{% endif %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m.content }}{% endfor %}{{ counted.a }}"
        "{% for i in range(0, 3, 2) %}{{ i }}{% endfor %}"
    ),
}
"""By the family whose form each follows."""

_TEXT: Final = "Gr\u00fc\u00dfe <b> & 'caf\u00e9' \u2014 \u4e1c\u4eac"
_CALL: Final = {
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "K\u00f6ln", "days": 2}},
}

CHATS: Final[dict[str, list[dict[str, Any]]]] = {
    "one question": [{"role": "user", "content": _TEXT}],
    "system": [
        {"role": "system", "content": "  Be <brief>.\n"},
        {"role": "user", "content": _TEXT},
    ],
    "several turns": [
        {"role": "user", "content": "a\n"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb "},
        {"role": "user", "content": " c"},
        {"role": "assistant", "content": "d", "reasoning": "since c"},
        {"role": "user", "content": "e"},
    ],
    "empty": [{"role": "user", "content": ""}],
    "no content": [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [_CALL]},
        {"role": "tool", "name": "weather", "content": '{"sky": "blue"}'},
    ],
    "parts": [
        {"role": "system", "content": [{"type": "text", "text": "Look."}]},
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": _TEXT}],
        },
    ],
    "wrong order": [
        {"role": "assistant", "content": "first"},
        {"role": "critic", "content": "second"},
    ],
    "named": [{"role": "user", "name": "Ada", "content": "1 < 2"}],
}

TOOLS: Final[list[dict[str, Any]]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather <soon> in a caf\u00e9's city",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "which"},
                    "days": {"type": "array", "items": {"type": "integer"}},
                },
                "required": ["city"],
            },
        },
    }
]
DOCUMENTS: Final[list[dict[str, str]]] = [{"title": "T & U", "text": "Some <i>text</i>."}]
