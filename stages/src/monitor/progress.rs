//! A bar with the time left on a terminal; elsewhere a plain line now and then.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

use super::table::printable;

/// Time between plain lines.
const LINE_INTERVAL: Duration = Duration::from_secs(10);
const BAR_TEMPLATE: &str = "{prefix:>10} [{bar:30}] {pos}/{len} {elapsed} (left {eta}) {wide_msg}";

/// Progress of one loop, shown on standard error.
pub struct Progress {
    show: Show,
}

enum Show {
    Bar(ProgressBar),
    Lines(Lines),
    Nothing,
}

impl Progress {
    /// Progress called `label` over `total` steps, of which `done` were made by earlier processes.
    pub fn new(label: &str, total: u64, done: u64) -> Self {
        let show = if std::io::stderr().is_terminal() {
            let bar = ProgressBar::new(total).with_position(done).with_prefix(label.to_owned());
            if let Ok(style) = ProgressStyle::with_template(BAR_TEMPLATE) {
                bar.set_style(style.progress_chars("=> "));
            }
            // The time left is judged by this process's own speed.
            bar.reset_eta();
            Show::Bar(bar)
        } else {
            Show::Lines(Lines::new(label, total, done, Instant::now()))
        };
        Self { show }
    }

    /// Progress that nobody is shown: of a rank that follows another one.
    pub fn silent() -> Self {
        Self { show: Show::Nothing }
    }

    /// Says that `step` steps are done, with a few figures.
    pub fn update(&mut self, step: u64, figures: &str) {
        match &mut self.show {
            Show::Bar(bar) => {
                bar.set_message(printable(figures));
                bar.set_position(step);
            }
            Show::Lines(lines) => {
                if let Some(line) = lines.line(step, figures, Instant::now()) {
                    print_line(&line);
                }
            }
            Show::Nothing => {}
        }
    }

    /// Prints a line without disturbing the bar.
    pub fn note(&self, text: &str) {
        match &self.show {
            Show::Bar(bar) => bar.suspend(|| print_line(text)),
            Show::Lines(_) => print_line(text),
            Show::Nothing => {}
        }
    }

    /// Leaves the last state on the screen.
    pub fn finish(self) {
        if let Show::Bar(bar) = self.show {
            bar.abandon();
        }
    }
}

/// A closed standard error is no reason to stop a run.
fn print_line(text: &str) {
    let _ = writeln!(std::io::stderr(), "{}", printable(text));
}

/// Decides when a plain line is due, and writes it.
struct Lines {
    label: String,
    total: u64,
    first: u64,
    start: Instant,
    last: Option<Instant>,
}

impl Lines {
    fn new(label: &str, total: u64, done: u64, now: Instant) -> Self {
        Self { label: label.to_owned(), total, first: done, start: now, last: None }
    }

    fn line(&mut self, step: u64, figures: &str, now: Instant) -> Option<String> {
        let due = self.last.is_none_or(|last| now - last >= LINE_INTERVAL) || step >= self.total;
        if !due {
            return None;
        }
        self.last = Some(now);
        let made = step.saturating_sub(self.first);
        let left = self.total.saturating_sub(step);
        let left = match u32::try_from(made) {
            Ok(made) if made > 0 && left > 0 => {
                let seconds = (now - self.start).as_secs_f64() / f64::from(made) * left as f64;
                // Rounded to a second; absurdly long times saturate instead of failing.
                let time = Duration::try_from_secs_f64(seconds.round()).unwrap_or(Duration::MAX);
                format!(", {} left", HumanDuration(time))
            }
            _ => String::new(),
        };
        Some(format!("{} {step}/{}{left}: {figures}", self.label, self.total))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_lines_come_first_last_and_now_and_then() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut lines = Lines::new("sft", 10, 4, start);
        assert_eq!(lines.line(5, "loss 2", at(5)).unwrap(), "sft 5/10, 25 seconds left: loss 2");
        assert_eq!(lines.line(6, "loss 2", at(9)), None);
        assert_eq!(lines.line(7, "loss 1", at(15)).unwrap(), "sft 7/10, 15 seconds left: loss 1");
        assert_eq!(lines.line(10, "loss 1", at(16)).unwrap(), "sft 10/10: loss 1");
    }
}
