//! Requests dealt out to the groups of ranks that generate, and their answers brought back to all.

use tandem_engine::generate::{Completion, Finish, Request};
use tandem_engine::parallel::Parallel;

use crate::error::{Result, StageError};

/// How many groups of ranks generate, each on its own.
pub(in crate::ppo) fn groups(parallel: &Parallel) -> usize {
    parallel.world.size() / parallel.inference.size()
}

/// The requests of this rank's group: neighbours, about equally many for each group.
fn own(parallel: &Parallel, requests: usize) -> std::ops::Range<usize> {
    let (groups, group) = (groups(parallel), parallel.world.rank() / parallel.inference.size());
    requests * group / groups..requests * (group + 1) / groups
}

/// Lets `generate` answer the requests of this rank's group, and brings the answers of all groups to all ranks, in the order of
/// the requests. Groups do not wait for each other while they generate.
///
/// # Errors
/// What `generate` refuses, or a peer that failed.
pub(in crate::ppo) fn dealt(
    parallel: &Parallel,
    requests: &[Request],
    generate: impl FnOnce(&[Request]) -> Result<Vec<Completion>>,
) -> Result<Vec<Completion>> {
    let own = own(parallel, requests.len());
    let mut answers = generate(&requests[own.clone()])?;
    for answer in &mut answers {
        answer.request += own.start;
    }
    if parallel.world.is_solo() {
        return Ok(answers);
    }
    let mut message = Vec::new();
    if parallel.inference.rank() == 0 {
        answers.iter().for_each(|answer| write(answer, &mut message));
    }
    let mut all = Vec::new();
    for message in parallel.world.gather("rollouts", &message)? {
        let mut words = Words(&message);
        while !words.0.is_empty() {
            all.push(words.completion().ok_or_else(|| StageError::bug("the answers of a rank are cut off"))?);
        }
    }
    Ok(all)
}

fn write(answer: &Completion, message: &mut Vec<u8>) {
    let stopped = u64::from(answer.finish == Finish::Stop);
    for word in [answer.request as u64, answer.sample, stopped, answer.ids.len() as u64] {
        message.extend(word.to_le_bytes());
    }
    message.extend(answer.ids.iter().flat_map(|id| id.to_le_bytes()));
    let numbers = answer.logp.iter().chain(&answer.sampling_logp);
    message.extend(numbers.flat_map(|number| number.to_le_bytes()));
}

/// What is left of a message.
struct Words<'a>(&'a [u8]);

impl Words<'_> {
    fn completion(&mut self) -> Option<Completion> {
        let [request, sample, stopped, count] = [self.long()?, self.long()?, self.long()?, self.long()?];
        let count = count as usize;
        let ids = self.shorts(count)?.into_iter().map(u32::from_le_bytes).collect();
        let mut numbers = || Some(self.shorts(count)?.into_iter().map(f32::from_le_bytes).collect());
        let (logp, sampling_logp) = (numbers()?, numbers()?);
        let finish = if stopped == 1 { Finish::Stop } else { Finish::Length };
        Some(Completion { request: request as usize, sample, ids, logp, sampling_logp, finish })
    }

    fn long(&mut self) -> Option<u64> {
        let (word, rest) = self.0.split_first_chunk::<8>()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*word))
    }

    fn shorts(&mut self, count: usize) -> Option<Vec<[u8; 4]>> {
        let (words, rest) = self.0.split_at_checked(count.checked_mul(4)?)?;
        self.0 = rest;
        Some(words.as_chunks::<4>().0.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_as_they_were_written() {
        let answer = |sample: u64, len: usize, finish| Completion {
            request: 3,
            sample,
            ids: (0..len as u32).collect(),
            logp: vec![-0.25; len],
            sampling_logp: vec![f32::MIN_POSITIVE; len],
            finish,
        };
        let answers = [answer(u64::MAX, 5, Finish::Stop), answer(0, 0, Finish::Length)];
        let mut message = Vec::new();
        answers.iter().for_each(|answer| write(answer, &mut message));
        let mut words = Words(&message);
        assert_eq!([words.completion().unwrap(), words.completion().unwrap()], answers);
        assert!(words.0.is_empty());
        assert_eq!(Words(&message[..40]).completion(), None);
    }
}
