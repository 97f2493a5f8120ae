//! Rows become examples.

use serde_json::json;
use tandem_data::{Example, FieldMap, Message, Prompt};

use crate::support::row;

fn example(fields: serde_json::Value) -> Example {
    FieldMap::default().example(&row(fields)).unwrap()
}

fn error(map: &FieldMap, fields: serde_json::Value) -> String {
    map.example(&row(fields)).unwrap_err().to_string()
}

fn text(prompt: &str) -> Prompt {
    Prompt::Text(prompt.into())
}

#[test]
fn usual_names_are_understood() {
    assert_eq!(example(json!({"text": "a", "rating": 2})), Example::Text { text: "a".into(), rating: Some(2.0) });
    assert_eq!(
        example(json!({"prompt": "p", "chosen": "c", "rejected": "r", "margin": 0.5})),
        Example::Pair { prompt: text("p"), chosen: "c".into(), rejected: "r".into(), margin: Some(0.5) }
    );
    for response in ["response", "output", "completion"] {
        let fields = json!({"instruction": "i", "input": "", response: "r"});
        assert_eq!(example(fields), Example::Response { prompt: text("i"), response: "r".into() });
    }
    assert_eq!(
        example(json!({"instruction": "sum up", "input": "long text", "output": "short"})),
        Example::Response { prompt: text("sum up\n\nlong text"), response: "short".into() }
    );
    assert_eq!(example(json!({"prompt": "p"})), Example::Prompt { prompt: text("p") });
    let messages = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]);
    assert_eq!(
        example(json!({"messages": messages})),
        Example::Chat { messages: vec![Message::user("hi"), Message::assistant("ho")] }
    );
    assert_eq!(
        example(json!({"prompt": messages, "response": "r"})),
        Example::Response {
            prompt: Prompt::Messages(vec![Message::user("hi"), Message::assistant("ho")]),
            response: "r".into()
        }
    );
}

#[test]
fn pairs_of_conversations_share_their_prompt() {
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    let ask = turn("user", "which?");
    assert_eq!(
        example(json!({"chosen": [ask, turn("assistant", "this")], "rejected": [ask, turn("assistant", "that")]})),
        Example::Pair {
            prompt: Prompt::Messages(vec![Message::user("which?")]),
            chosen: "this".into(),
            rejected: "that".into(),
            margin: None
        }
    );
    let other =
        json!({"chosen": [ask, turn("assistant", "a")], "rejected": [turn("user", "x"), turn("assistant", "b")]});
    assert!(error(&FieldMap::default(), other).contains("different conversations"));
    let user_last = json!({"chosen": [ask], "rejected": [ask]});
    assert!(error(&FieldMap::default(), user_last).contains("must be the assistant's"));
}

#[test]
fn transcripts_without_a_prompt_field_are_split_at_the_last_shared_turn() {
    let shared = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: why\n\nAssistant:";
    let pair = example(json!({"chosen": format!("{shared} because"), "rejected": format!("{shared} bah")}));
    let Example::Pair { prompt, chosen, rejected, .. } = pair else { panic!("{pair:?}") };
    assert_eq!((prompt, chosen.as_str(), rejected.as_str()), (text(shared), " because", " bah"));
    let error = error(&FieldMap::default(), json!({"chosen": "a", "rejected": "b"}));
    assert!(error.contains("\"prompt\" is missing"), "{error}");
}

#[test]
fn a_mapping_renames_fields_and_must_be_met() {
    let map = FieldMap { prompt: Some("question".into()), response: Some("best".into()), ..FieldMap::default() };
    let row_fields = json!({"question": "q", "best": "b", "text": "t"});
    assert_eq!(map.example(&row(row_fields)).unwrap(), Example::Response { prompt: text("q"), response: "b".into() });
    let error = error(&map, json!({"questoin": "q", "best": "b"}));
    for part in ["rows.jsonl:7", "\"question\"", "mapped as prompt", "best, questoin", "did you mean \"questoin\"?"] {
        assert!(error.contains(part), "{error:?} does not say {part:?}");
    }
}

#[test]
fn what_is_wrong_with_a_field_is_said() {
    let map = FieldMap::default();
    for (fields, reason) in [
        (json!({}), "the row has no fields"),
        (json!({"txet": "a"}), "did you mean \"txet\"?"),
        (json!({"text": 3}), "\"text\" is a number where a text belongs"),
        (json!({"text": "  "}), "empty text"),
        (json!({"text": "a", "rating": "high"}), "\"rating\" is a text where a finite number belongs"),
        (json!({"text": "a", "rating": 1e300}), "finite number"),
        (json!({"prompt": "p", "chosen": "c"}), "\"rejected\" is missing"),
        (json!({"response": "r"}), "\"prompt\" is missing"),
        (json!({"messages": []}), "at least one message"),
        (json!({"messages": "hi"}), "a list of messages"),
        (json!({"messages": [{"role": "user"}]}), "message 1 of \"messages\" has no text \"content\""),
        (json!({"messages": [{"role": "user", "content": null}]}), "no text \"content\""),
        (json!({"text": null, "label": 1}), "the row has: label, text"),
    ] {
        let error = error(&map, fields);
        assert!(error.contains(reason) && error.contains("rows.jsonl:7"), "{error:?} does not say {reason:?}");
    }
}

#[test]
fn stages_take_what_they_need_or_say_why_not() {
    let origin = row(json!({})).origin;
    let pair = example(json!({"prompt": "p", "chosen": "c", "rejected": "r"}));
    let demonstration = pair.clone().into_demonstration(&origin).unwrap();
    assert_eq!((demonstration.prompt, demonstration.response.as_str()), (Some(text("p")), "c"));
    assert_eq!(pair.into_prompt(&origin).unwrap(), text("p"));
    let chat = Example::Chat { messages: vec![Message::user("a"), Message::assistant("b"), Message::user("c")] };
    let demonstration = chat.clone().into_demonstration(&origin).unwrap();
    assert_eq!(demonstration.prompt, Some(Prompt::Messages(vec![Message::user("a")])));
    assert_eq!(demonstration.response, "b");
    assert_eq!(
        chat.into_prompt(&origin).unwrap(),
        Prompt::Messages(vec![Message::user("a"), Message::assistant("b"), Message::user("c")])
    );
    let bare = example(json!({"text": "t"}));
    assert!(bare.clone().into_prompt(&origin).unwrap_err().to_string().contains("a text row"));
    assert!(bare.into_comparison(&origin).unwrap_err().to_string().contains("chosen and rejected"));
    assert!(example(json!({"prompt": "p"})).into_demonstration(&origin).is_err());
}
