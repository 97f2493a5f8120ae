//! Chat templates as real models ship them, and hostile ones.

use std::time::{Duration, Instant};

use tandem_data::Message;
use tandem_data::template::{ChatTemplate, TemplateTokens};

use crate::support::CHATML;

const LLAMA_2: &str = "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}";
const LLAMA_3: &str = "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}";
const MISTRAL: &str = "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}";
const QWEN_2: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
const ZEPHYR: &str = "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}";
/// The constructs of the larger recent templates: whitespace control, namespaces, macros, block set, tools, dates.
const MODERN: &str = r#"{{- bos_token }}
{#- a comment with {% and }} inside -#}
{%- macro turn(role, content='none') -%}
<{{ role }}>{{ content|trim }}</{{ role }}>
{%- endmacro -%}
{%- if tools is not none %}{{ tools | tojson }}{% endif %}
{%- set ns = namespace(found=false, system='') %}
{%- for message in messages if message.role == 'system' %}
    {%- set ns.system = ns.system + message.content %}
    {%- set ns.found = true %}
{%- endfor %}
{%- if ns.found -%}[{{ ns.system }}|{{ strftime_now("%d %b %Y") }}]{%- endif %}
{%- set greeting %}
  hello {{ messages | length }}
{%- endset -%}
{{ greeting }}
{%- for message in messages[::-1] %}
    {%- if message['role'] == 'system' %}{% continue %}{% endif %}
    {%- generation %}{{ turn(message.role, message.content.replace('x', 'y')) }}{% endgeneration %}
{%- endfor %}
{{- {"a": [1, true, none], "b": "é\"<"} | tojson }}"#;

fn render(source: &str, messages: &[Message], add_generation_prompt: bool) -> Result<String, String> {
    let tokens = TemplateTokens { bos: "<s>".into(), eos: "</s>".into(), ..TemplateTokens::default() };
    let template = ChatTemplate::new("test", source, tokens).map_err(|error| error.to_string())?;
    template.render(messages, add_generation_prompt).map_err(|error| error.to_string())
}

fn talk() -> Vec<Message> {
    vec![Message::user("Hi"), Message::assistant("Hello!"), Message::user(" Why? ")]
}

fn with_system() -> Vec<Message> {
    [vec![Message::system("Be brief.")], talk()].concat()
}

#[test]
fn smollm2() {
    let system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n";
    let turns =
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\n Why? <|im_end|>\n";
    assert_eq!(render(CHATML, &talk(), true).unwrap(), format!("{system}{turns}<|im_start|>assistant\n"));
    assert_eq!(
        render(CHATML, &with_system(), false).unwrap(),
        format!("<|im_start|>system\nBe brief.<|im_end|>\n{turns}")
    );
}

#[test]
fn llama_2() {
    assert_eq!(
        render(LLAMA_2, &with_system(), true).unwrap(),
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello! </s><s>[INST] Why? [/INST]"
    );
    let error = render(LLAMA_2, &[Message::assistant("no")], true).unwrap_err();
    assert!(error.contains("refuses the conversation: Conversation roles must alternate"), "{error}");
}

#[test]
fn llama_3() {
    assert_eq!(
        render(LLAMA_3, &talk(), true).unwrap(),
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n\
         Hello!<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>\
         <|start_header_id|>assistant<|end_header_id|>\n\n"
    );
}

#[test]
fn mistral() {
    assert_eq!(render(MISTRAL, &talk(), true).unwrap(), "<s>[INST] Hi [/INST]Hello!</s>[INST]  Why?  [/INST]");
    assert!(render(MISTRAL, &with_system(), true).unwrap_err().contains("must alternate"));
}

#[test]
fn qwen_2() {
    assert_eq!(
        render(QWEN_2, &talk()[..1], true).unwrap(),
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
}

#[test]
fn zephyr_needs_trimmed_blocks() {
    assert_eq!(render(ZEPHYR, &talk()[..1], true).unwrap(), "<|user|>\nHi</s>\n<|assistant|>\n");
}

#[test]
fn modern_constructs() {
    assert_eq!(
        render(MODERN, &with_system(), false).unwrap(),
        "<s>[Be brief.|26 Jul 2024]  hello 4<user>Why?</user><assistant>Hello!</assistant><user>Hi</user>\
         {\"a\": [1, true, null], \"b\": \"é\\\"<\"}"
    );
}

#[test]
fn syntax_errors_name_the_line() {
    let error = render("line one\n{% if %}", &talk(), true).unwrap_err();
    assert!(error.contains("line 2"), "{error}");
    assert!(render("{{ 'open", &talk(), true).unwrap_err().contains("does not end"));
}

/// Programs that would run for ever or fill the memory. Each must be refused, soon.
#[test]
fn hostile_templates_are_stopped() {
    let nested = |depth: usize| {
        let open: String = (0..depth).map(|n| format!("{{% for a{n} in range(9999) %}}")).collect();
        format!("{open}x{}", "{% endfor %}".repeat(depth))
    };
    let hostile = [
        "{% set ns = namespace(s='aaaaaaaaaaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(s='aaaaaaaaaaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
        "{% set ns = namespace(a='xxxx', b='yyyy') %}{% for i in range(99) %}{% set ns.a = ns.a ~ ns.b %}{% set ns.b = ns.b ~ ns.a %}{% endfor %}",
        "{% macro f(s, n) %}{% if n > 0 %}{{ f(s ~ s, n - 1) }}{% endif %}{% endmacro %}{{ f('aaaaaaaa', 50) }}",
        "{% macro f(s, n, t=s ~ s) %}{% if n > 0 %}{{ f(t, n - 1) }}{% endif %}{% endmacro %}{{ f('aaaaaaaa', 50) }}",
        "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}{% endfor %}",
        "{% set ns = namespace(s='aaaa') %}{% for i in range(9) %}{% set ns.s = ns.s.replace('a', ns.s) %}{% endfor %}{{ ns.s }}",
        "{% set ns = namespace(s='aaaa') %}{% for i in range(9) %}{% set ns.s = ns.s | replace('a', ns.s) %}{% endfor %}{{ ns.s }}",
        "{% set ns = namespace(s='aaaa') %}{% for i in range(9) %}{% set ns.s = ns.s.join(ns.s | list) %}{% endfor %}{{ ns.s }}",
        "{% set ns = namespace(s='aaaa') %}{% for i in range(60) %}{% for t in [ns.s ~ ns.s] %}{% set ns.s = t %}{% endfor %}{% endfor %}",
        "{% set ns = namespace() %}{% set ns.me = ns %}{{ ns }}",
        "{% set bounded = 3 %}{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{{ 'a' * 100000000 }}",
        "{{ range(100000000) | list }}",
        "{{ range(0, 9223372036854775807, 3) | list }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ 'a'.format(1) }}",
        "{{ 'a' | indent(1000000000) }}",
        "{{ [1] | tojson(indent=1000000000) }}",
        "{% set ns = namespace(s='') %}{% for i in range(9999) %}{% for j in range(9999) %}{% set ns.s = ns.s ~ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{% for x in [1, [2]] recursive %}{{ loop(x) }}{% endfor %}",
        "{% include 'x' %}",
        "{% raw %}{% endraw %}",
    ];
    let large = [nested(3), format!("{{{{ 's'{} }}}}", " ~ 's'".repeat(500)), "a".repeat(200 << 10)];
    for source in hostile.iter().map(|source| (*source).to_owned()).chain(large) {
        let start = Instant::now();
        let result = render(&source, &talk(), true);
        let shown: String = source.chars().take(120).collect();
        assert!(result.is_err(), "{shown} was allowed: {} bytes", result.unwrap().len());
        assert!(start.elapsed() < Duration::from_secs(10), "{shown} took {:?}", start.elapsed());
    }
}

#[test]
fn what_reaches_outside_is_not_there() {
    for source in [
        "{{ debug() }}",
        "{{ open('/etc/passwd') }}",
        "{{ messages.__class__ }}{{ ''.__class__.__mro__ }}",
        "{% import 'os' as os %}",
    ] {
        let result = render(source, &talk(), true);
        assert!(result.is_err() || result.as_deref() == Ok(""), "{source}: {result:?}");
    }
}

#[test]
fn an_endless_conversation_is_refused() {
    let long = Message::user("a".repeat(2 << 20));
    assert!(render(CHATML, &[long], true).unwrap_err().contains("more than the"));
}
