//! Where the time of a stage went, by class of kernels: `--profile`.

use std::time::Duration;

use tandem_kernels::profile::{self, Class, Counted};

use super::Table;

/// The breakdown of what was counted since the last call, which took `elapsed` on each of `ranks` ranks of this process; `None`
/// if nothing is counted.
pub fn breakdown(elapsed: Duration, ranks: usize) -> Option<Table> {
    profile::is_on().then(|| table(&profile::take(), elapsed, ranks))
}

fn table(counted: &[(Class, Counted)], elapsed: Duration, ranks: usize) -> Table {
    let all = elapsed.as_secs_f64() * ranks as f64;
    let mut table = Table::new(["where the time went", "s", "share", "calls", "GFLOP/s"]);
    let mut rows: Vec<_> = counted.iter().filter(|(_, counted)| counted.calls > 0).collect();
    rows.sort_by_key(|(_, counted)| std::cmp::Reverse(counted.elapsed));
    let share = |seconds: f64| format!("{:.1} %", 100.0 * seconds / all.max(f64::MIN_POSITIVE));
    let mut rest = all;
    for (class, counted) in rows {
        let seconds = counted.elapsed.as_secs_f64();
        rest -= seconds;
        let rate = match counted.operations {
            0 => String::new(),
            operations => format!("{:.0}", operations as f64 / seconds.max(f64::MIN_POSITIVE) / 1e9),
        };
        table.row([class.name().to_owned(), format!("{seconds:.2}"), share(seconds), counted.calls.to_string(), rate]);
    }
    let rest = rest.max(0.0);
    table.row(["all else: data, exchange, files".to_owned(), format!("{rest:.2}"), share(rest)]);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_comes_first_and_nothing_is_left_out() {
        let counted = |ms, calls, operations| Counted { elapsed: Duration::from_millis(ms), calls, operations };
        let all = [
            (Class::Linear, counted(250, 5, 100_000_000_000)),
            (Class::Sample, counted(0, 0, 0)),
            (Class::Head, counted(500, 1, 0)),
        ];
        let text = table(&all, Duration::from_secs(1), 1).to_string();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[2].starts_with("head ") && lines[2].contains("50.0 %"), "{text}");
        assert!(lines[3].starts_with("linear maps") && lines[3].ends_with("400"), "{text}");
        assert!(lines[4].starts_with("all else") && lines[4].contains("25.0 %"), "{text}");
        assert_eq!(lines.len(), 5, "{text}");
    }
}
