//! The ranges that values must lie in. Every section's `check` goes through this, so all problems are found at once and
//! said in the same words.

use std::fmt::Display;

/// Collects what is wrong.
#[derive(Debug, Default)]
pub(super) struct Checker {
    problems: Vec<String>,
}

impl Checker {
    /// What was found.
    pub(super) fn into_problems(self) -> Vec<String> {
        self.problems
    }

    /// Notes a problem with the value at `key`.
    pub(super) fn fail(&mut self, key: &str, problem: impl Display) {
        self.problems.push(format!("`{key}` {problem}"));
    }

    /// A count of at least `least`.
    pub(super) fn at_least<T: PartialOrd + Display>(&mut self, key: &str, value: T, least: T) {
        if value < least {
            self.fail(key, format_args!("is {value}; it must be at least {least}"));
        }
    }

    /// As [`Self::at_least`] 1, for a value that may be absent.
    pub(super) fn optional_count(&mut self, key: &str, value: Option<usize>) {
        if value == Some(0) {
            self.fail(key, "is 0; it must be at least 1, or be left out");
        }
    }

    /// A finite number above zero.
    pub(super) fn positive(&mut self, key: &str, value: f64) {
        if !(value.is_finite() && value > 0.0) {
            self.fail(key, format_args!("is {value}; it must be above 0"));
        }
    }

    /// A finite number, zero or above.
    pub(super) fn not_negative(&mut self, key: &str, value: f64) {
        if !(value.is_finite() && value >= 0.0) {
            self.fail(key, format_args!("is {value}; it must be 0 or above"));
        }
    }

    /// A finite number.
    pub(super) fn finite(&mut self, key: &str, value: f64) {
        if !value.is_finite() {
            self.fail(key, format_args!("is {value}; it must be a finite number"));
        }
    }

    /// A number in `0 ≤ value < 1`.
    pub(super) fn below_one(&mut self, key: &str, value: f64) {
        if !(0.0..1.0).contains(&value) {
            self.fail(key, format_args!("is {value}; it must be at least 0 and below 1"));
        }
    }

    /// A number in `0 ≤ value ≤ 1`.
    pub(super) fn fraction(&mut self, key: &str, value: f64) {
        if !(0.0..=1.0).contains(&value) {
            self.fail(key, format_args!("is {value}; it must lie between 0 and 1"));
        }
    }

    /// A number in `0 < value ≤ 1`.
    pub(super) fn positive_fraction(&mut self, key: &str, value: f64) {
        if !(value > 0.0 && value <= 1.0) {
            self.fail(key, format_args!("is {value}; it must be above 0 and at most 1"));
        }
    }

    /// Exactly one of several alternatives.
    pub(super) fn exactly_one(&mut self, section: &str, keys: &[&str], given: &[bool]) {
        let count = given.iter().filter(|&&given| given).count();
        if count != 1 {
            let found = if count == 0 { "none is" } else { "more than one is" };
            self.fail(section, format_args!("needs exactly one of {}; {found} given", keys.join(", ")));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn not_a_number_is_in_no_range() {
        let mut check = Checker::default();
        check.positive("a", f64::NAN);
        check.not_negative("b", f64::NAN);
        check.finite("c", f64::NAN);
        check.below_one("d", f64::NAN);
        check.fraction("e", f64::NAN);
        check.positive_fraction("f", f64::NAN);
        assert_eq!(check.into_problems().len(), 6);
    }

    #[test]
    fn the_ends_of_the_ranges() {
        let mut check = Checker::default();
        check.not_negative("a", 0.0);
        check.below_one("a", 0.0);
        check.fraction("a", 1.0);
        check.positive_fraction("a", 1.0);
        check.at_least("a", 1, 1);
        check.exactly_one("a", &["x", "y"], &[true, false]);
        check.optional_count("a", None);
        assert_eq!(check.into_problems(), [""; 0]);
        let mut check = Checker::default();
        check.positive("a", 0.0);
        check.below_one("a", 1.0);
        check.fraction("a", -0.1);
        check.positive_fraction("a", 0.0);
        check.at_least("a", 0, 1);
        check.exactly_one("a", &["x", "y"], &[true, true]);
        check.optional_count("a", Some(0));
        assert_eq!(check.into_problems().len(), 7);
    }
}
