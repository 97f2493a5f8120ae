//! Scores of an external program, in any language: it reads JSON lines `{"id", "prompt", "response"}` from standard input
//! until its end and writes `{"id", "score"}`, in any order, to standard output.
//!
//! The program is started anew for each call, so it needs no protocol for staying alive and cannot keep a wrong state.

use std::io::{BufWriter, Read, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{ScoreItem, Scorer, finite};
use crate::error::{Result, StageError};

/// Longest answer to one item, in bytes; far more than a number and an id need.
const MAX_ANSWER_BYTES: u64 = 4096;
/// How much of the program's messages an error repeats, in bytes.
const SHOWN_MESSAGE_BYTES: usize = 2000;
/// Between two looks at whether the program has ended.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// An external program that scores.
#[derive(Debug)]
pub struct CommandScorer {
    program: String,
    arguments: Vec<String>,
    timeout: Duration,
}

/// A line for the program.
#[derive(Serialize)]
struct Question<'a> {
    id: usize,
    prompt: &'a str,
    response: &'a str,
}

/// A line of the program. It may hold more fields.
#[derive(Deserialize)]
struct Answer {
    id: usize,
    score: f64,
}

/// What the program left behind.
struct Ended {
    status: ExitStatus,
    output: Vec<u8>,
    messages: Vec<u8>,
}

impl CommandScorer {
    /// A scorer that runs `command`, a program and its arguments, and waits at most `timeout_s` seconds for it.
    ///
    /// # Errors
    /// If there is no program or no time.
    pub fn new(command: &[String], timeout_s: f64) -> Result<Self> {
        let Some((program, arguments)) = command.split_first() else {
            return Err(StageError::Reward("the command is empty; give a program and its arguments".into()));
        };
        let timeout = Duration::try_from_secs_f64(timeout_s)
            .map_err(|error| StageError::Reward(format!("command_timeout_s = {timeout_s}: {error}")))?;
        Ok(Self { program: program.clone(), arguments: arguments.to_vec(), timeout })
    }

    fn wrong(&self, problem: impl std::fmt::Display) -> StageError {
        StageError::Reward(format!("the command `{}` {problem}", self.program))
    }

    /// Runs the program to its end.
    fn run(&self, input: Vec<u8>, max_output: u64) -> Result<Ended> {
        let deadline = Instant::now() + self.timeout;
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // A group of its own: Ctrl-C must let the iteration end, and what the program starts must end with it.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let child = command.spawn().map_err(|error| self.wrong(format_args!("cannot be started: {error}")))?;
        let mut running = Running { child, ended: false };
        let piped = || StageError::bug("a piped stream is missing");
        feed(running.child.stdin.take().ok_or_else(piped)?, input);
        let stdout = running.child.stdout.take().ok_or_else(piped)?;
        let stderr = running.child.stderr.take().ok_or_else(piped)?;
        // One byte more tells that there was more.
        let output = in_background(move || beginning_of(stdout, max_output + 1));
        let messages = in_background(move || end_of(stderr));
        loop {
            match running.child.try_wait() {
                Ok(Some(status)) => {
                    let collect = |stream: Receiver<Vec<u8>>| {
                        let left = deadline.saturating_duration_since(Instant::now());
                        stream.recv_timeout(left).map_err(|_| self.late())
                    };
                    let ended = Ended { status, output: collect(output)?, messages: collect(messages)? };
                    running.ended = true;
                    return Ok(ended);
                }
                Ok(None) if Instant::now() >= deadline => return Err(self.late()),
                Ok(None) => thread::sleep(POLL_INTERVAL),
                Err(error) => return Err(self.wrong(format_args!("cannot be waited for: {error}"))),
            }
        }
    }

    fn late(&self) -> StageError {
        self.wrong(format_args!(
            "has not ended within {} s and was stopped; make it faster, let it end with its input, or raise \
             ppo.reward.command_timeout_s",
            self.timeout.as_secs_f64()
        ))
    }

    /// Sorts the answers in `output` into the order of the items.
    fn parse(&self, output: &[u8], items: usize) -> Result<Vec<f32>> {
        let mut scores: Vec<Option<f32>> = vec![None; items];
        for (index, line) in output.split(|&byte| byte == b'\n').enumerate() {
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let number = index + 1;
            let answer: Answer = serde_json::from_slice(line).map_err(|error| {
                let line = String::from_utf8_lossy(line);
                self.wrong(format_args!("wrote {:?} as line {number}: {error}", super::beginning(&line)))
            })?;
            match scores.get_mut(answer.id) {
                None => {
                    return Err(self.wrong(format_args!("wrote a score for id {}, which it was not given", answer.id)));
                }
                Some(Some(_)) => return Err(self.wrong(format_args!("wrote two scores for id {}", answer.id))),
                Some(score) => *score = Some(answer.score as f32),
            }
        }
        let missing = scores.iter().filter(|score| score.is_none()).count();
        if let Some(first) = scores.iter().position(Option::is_none) {
            return Err(self.wrong(format_args!(
                "wrote no score for {missing} of {items} ids, the first of them {first}; it must answer every line"
            )));
        }
        Ok(scores.into_iter().flatten().collect())
    }
}

impl Scorer for CommandScorer {
    fn score(&mut self, items: &[ScoreItem<'_>]) -> Result<Vec<f32>> {
        if items.is_empty() {
            return Ok(Vec::new());
        }
        let mut input = Vec::new();
        for (id, item) in items.iter().enumerate() {
            let question = Question { id, prompt: item.prompt_text, response: item.response_text };
            serde_json::to_writer(&mut input, &question).map_err(StageError::bug)?;
            input.push(b'\n');
        }
        let max_output = MAX_ANSWER_BYTES * items.len() as u64;
        let ended = self.run(input, max_output)?;
        if ended.output.len() as u64 > max_output {
            return Err(self.wrong(format_args!("wrote more than {MAX_ANSWER_BYTES} bytes per response")));
        }
        if !ended.status.success() {
            let messages = String::from_utf8_lossy(&ended.messages);
            return Err(self.wrong(format_args!("failed ({}): {}", ended.status, messages.trim())));
        }
        finite(self.parse(&ended.output, items.len())?, items)
    }
}

/// A program under way. Unless it has ended it is stopped with this value, and so is all that it has started.
struct Running {
    child: Child,
    ended: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        #[cfg(unix)]
        {
            let group = rustix::process::Pid::from_child(&self.child);
            // Fails only if all of them have ended in the meantime.
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Writes `input` from a thread of its own: the program may answer, and block on that, before it has read everything.
fn feed(stdin: ChildStdin, input: Vec<u8>) {
    thread::spawn(move || {
        // A program that ends early says so by its status and its answers.
        let mut stdin = BufWriter::new(stdin);
        let _ = stdin.write_all(&input).and_then(|()| stdin.flush());
    });
}

/// Runs `read` in a thread of its own; after a timeout nobody waits for it any more.
fn in_background(read: impl FnOnce() -> Vec<u8> + Send + 'static) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let _ = sender.send(read());
    });
    receiver
}

/// The first `limit` bytes of a stream.
fn beginning_of(stream: impl Read, limit: u64) -> Vec<u8> {
    let mut kept = Vec::new();
    // What was read before an error is judged like any other answer.
    let _ = stream.take(limit).read_to_end(&mut kept);
    kept
}

/// The last [`SHOWN_MESSAGE_BYTES`] of a stream, which is read to its end.
fn end_of(mut stream: impl Read) -> Vec<u8> {
    let mut kept = Vec::new();
    let mut part = [0; SHOWN_MESSAGE_BYTES];
    while let Ok(count @ 1..) = stream.read(&mut part) {
        kept.extend_from_slice(&part[..count]);
        kept.drain(..kept.len().saturating_sub(SHOWN_MESSAGE_BYTES));
    }
    kept
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    fn score(script: &str, texts: &[&str], timeout_s: f64) -> Result<Vec<f32>> {
        let command: Vec<String> = ["sh", "-c", script].iter().map(|part| (*part).to_owned()).collect();
        let items: Vec<ScoreItem<'_>> = texts
            .iter()
            .map(|response_text| ScoreItem { prompt_ids: &[], response_ids: &[], prompt_text: "p\n\"", response_text })
            .collect();
        CommandScorer::new(&command, timeout_s)?.score(&items)
    }

    fn fails(script: &str) -> String {
        score(script, &["a", "b"], 20.0).unwrap_err().to_string()
    }

    #[test]
    fn answers_are_put_in_order() {
        let script = r#"cat >/dev/null; echo '{"id":1,"score":-2.5,"why":"x"}'; echo; echo '{"id":0,"score":1}'"#;
        assert_eq!(score(script, &["a", "b"], 20.0).unwrap(), [1.0, -2.5]);
        assert_eq!(score("exit 1", &[], 20.0).unwrap(), [0.0; 0], "nothing to score, nothing to run");
    }

    #[test]
    fn the_program_reads_what_was_written() {
        let script =
            r#"read line; [ "$line" = '{"id":0,"prompt":"p\n\"","response":"é"}' ] && echo '{"id":0,"score":7}'"#;
        let script = format!("set -f; IFS=; {}", script.replace("read line", "read -r line"));
        assert_eq!(score(&script, &["é"], 20.0).unwrap(), [7.0]);
    }

    #[test]
    fn much_text_both_ways_does_not_block() {
        let long = "x".repeat(300_000);
        let script = r#"head -c 200000 /dev/zero | tr '\0' '.' >&2; cat >/dev/null; printf '{"id":0,"score":1}\n'"#;
        assert_eq!(score(script, &[&long], 20.0).unwrap(), [1.0]);
    }

    #[test]
    fn faults_of_the_program_are_told() {
        for (script, expected) in [
            ("cat >/dev/null; echo lost >&2; exit 3", "exit status: 3): lost"),
            ("cat >/dev/null; echo '{\"id\":0,\"score\":1}'", "no score for 1 of 2 ids, the first of them 1"),
            ("echo '{\"id\":0,\"score\":1}'; echo '{\"id\":0,\"score\":1}'", "two scores for id 0"),
            ("echo '{\"id\":9,\"score\":1}'", "id 9, which it was not given"),
            ("echo '{\"id\":0,\"score\":NaN}'", "as line 1"),
            ("echo '{\"id\":0,\"score\":1}'; echo '{\"id\":1,\"score\":1e300}'", "score of response 1 is inf"),
            ("head -c 20000 /dev/zero | tr '\\0' '.'", "more than 4096 bytes per response"),
        ] {
            let message = fails(script);
            assert!(message.contains(expected), "{script}: {message}");
        }
        let command = ["/does/not/exist".to_owned()];
        let item = ScoreItem { prompt_ids: &[], response_ids: &[], prompt_text: "", response_text: "" };
        let message = CommandScorer::new(&command, 1.0).unwrap().score(&[item]).unwrap_err().to_string();
        assert!(message.contains("cannot be started"), "{message}");
    }

    #[test]
    fn a_program_that_hangs_is_stopped_with_its_children() {
        let start = Instant::now();
        let message = score("sleep 60 & sleep 60", &["a"], 0.2).unwrap_err().to_string();
        assert!(message.contains("not ended within 0.2 s"), "{message}");
        // A child that keeps the output open counts as not ended too.
        assert!(score("sleep 60 & exit 0", &["a"], 0.2).is_err());
        assert!(start.elapsed() < Duration::from_secs(10));
    }
}
