//! The names the store gives and accepts. One grammar, matched exactly: what does not match is not ours and is left alone.

use std::hash::{BuildHasher, Hasher, RandomState};

use crate::error::{Result, StoreError};

/// Longest accepted name of a published file, in bytes.
const MAX_FILE_NAME: usize = 128;
/// Prefix of a directory or file that is still being written.
const STAGING_PREFIX: &str = ".tmp-";
/// Prefix of a directory that is being removed.
const TRASH_PREFIX: &str = ".trash-";
/// Hexadecimal digits of a [`unique_id`].
const ID_LEN: usize = 32;

/// 32 random hexadecimal digits.
///
/// The standard library seeds each `RandomState` from the operating system; nothing but uniqueness depends on it.
pub(crate) fn unique_id() -> String {
    let random = || {
        let mut hasher = RandomState::new().build_hasher();
        hasher.write_u32(std::process::id());
        hasher.finish()
    };
    format!("{:016x}{:016x}", random(), random())
}

/// Name of the staging directory (or file) of `final_name`.
pub(crate) fn staging_name(final_name: &str) -> String {
    format!("{STAGING_PREFIX}{}-{final_name}", unique_id())
}

/// Name under which `final_name` waits for its removal.
pub(crate) fn trash_name(final_name: &str) -> String {
    format!("{TRASH_PREFIX}{}-{final_name}", unique_id())
}

/// Whether `name` was made by [`staging_name`] or [`trash_name`].
pub(crate) fn is_leftover(name: &str) -> bool {
    let rest = name.strip_prefix(STAGING_PREFIX).or_else(|| name.strip_prefix(TRASH_PREFIX));
    let Some((id, final_name)) = rest.and_then(|rest| rest.split_at_checked(ID_LEN)) else { return false };
    id.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
        && final_name.len() > 1
        && final_name.starts_with('-')
}

/// The number in `{prefix}-{number}`: decimal digits, no sign, no leading zero, nothing after.
pub(crate) fn entry_number(name: &str, prefix: &str) -> Option<u64> {
    let digits = name.strip_prefix(prefix)?.strip_prefix('-')?;
    let canonical = digits.bytes().all(|byte| byte.is_ascii_digit()) && (digits == "0" || !digits.starts_with('0'));
    if canonical { digits.parse().ok() } else { None }
}

/// Accepts one plain path component: letters, digits, `.`, `_` and `-`, not starting with a dot.
///
/// # Errors
/// [`StoreError::Name`] for anything that could point elsewhere or clash with the store's own names.
pub(crate) fn check_file_name(name: &str) -> Result<()> {
    let problem = if name.is_empty() {
        "it is empty"
    } else if name.len() > MAX_FILE_NAME {
        "it is longer than 128 bytes"
    } else if name.starts_with('.') {
        "it starts with a dot"
    } else if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-')) {
        "only letters, digits, '.', '_' and '-' are allowed"
    } else {
        return Ok(());
    };
    Err(StoreError::Name { name: name.to_owned(), problem })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_matched_exactly() {
        assert_eq!(entry_number("step-0", "step"), Some(0));
        assert_eq!(entry_number("step-120", "step"), Some(120));
        for foreign in
            ["step-", "step-01", "step-1-bak", "step-+1", "xstep-1", "step1", "iter-1", "step-99999999999999999999"]
        {
            assert_eq!(entry_number(foreign, "step"), None, "{foreign}");
        }
    }

    #[test]
    fn leftovers_are_only_our_own() {
        assert!(is_leftover(&staging_name("step-3")));
        assert!(is_leftover(&trash_name("step-3")));
        for foreign in [".tmp-", ".tmp-step-3", ".tmp-0123-step-3", ".trash", "tmp-x", ".tmp-é"] {
            assert!(!is_leftover(foreign), "{foreign}");
        }
        let without_name = format!(".tmp-{}", "0".repeat(32));
        assert!(!is_leftover(&without_name));
    }

    #[test]
    fn file_names_are_plain_components() {
        for good in ["model.safetensors", "part-r0.parquet", "a"] {
            check_file_name(good).unwrap();
        }
        for bad in ["", ".", "..", "../x", "/etc/passwd", "a/b", "C:\\x", ".hidden", "a\0b", "ü", &"x".repeat(129)] {
            assert!(check_file_name(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn ids_differ() {
        assert_ne!(unique_id(), unique_id());
    }
}
