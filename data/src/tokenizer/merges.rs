//! Learning byte-pair merges (Sennrich et al. 2016, algorithm 1), incrementally: only words that hold the merged pair are
//! visited.
//!
//! The `tokenizers` crate has such a trainer too, but it walks hash maps with random seeds, and where merges meet in one and the
//! same token its result can depend on that. Here the same corpus gives the same merges, on every machine.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap};

type Pair = (u32, u32);

/// The learnt vocabulary.
pub(super) struct Merges {
    /// Token strings by id.
    pub(super) tokens: Vec<String>,
    /// Pairs of tokens to merge, in order.
    pub(super) merges: Vec<Pair>,
}

/// Learns merges from counted words until there are `vocab_size` tokens or no pair occurs `min_frequency` times. `tokens` are
/// there from the beginning and hold every character that occurs. Of equally frequent pairs the one with the smaller ids
/// goes first.
pub(super) fn learn(
    words: &BTreeMap<String, u64>,
    tokens: Vec<String>,
    vocab_size: usize,
    min_frequency: u64,
) -> Merges {
    let mut ids: HashMap<String, u32> = tokens.iter().cloned().zip(0..).collect();
    let mut tokens = tokens;
    let mut merges = Vec::new();
    let mut corpus = Corpus::new(words, &ids);
    while tokens.len() < vocab_size {
        let Some(pair) = corpus.most_frequent(min_frequency) else { break };
        let merged = format!("{}{}", tokens[pair.0 as usize], tokens[pair.1 as usize]);
        let id = *ids.entry(merged.clone()).or_insert_with(|| {
            tokens.push(merged);
            tokens.len() as u32 - 1
        });
        merges.push(pair);
        corpus.merge(pair, id);
    }
    Merges { tokens, merges }
}

struct Corpus {
    words: Vec<(Vec<u32>, u64)>,
    counts: HashMap<Pair, u64>,
    places: HashMap<Pair, BTreeSet<usize>>,
    /// Counts as they were when pushed; an entry that no longer agrees with `counts` is stale.
    queue: BinaryHeap<(u64, Reverse<Pair>)>,
}

impl Corpus {
    fn new(words: &BTreeMap<String, u64>, ids: &HashMap<String, u32>) -> Self {
        let spell =
            |word: &String| word.chars().filter_map(|c| ids.get(c.encode_utf8(&mut [0; 4]) as &str).copied()).collect();
        let words = words.iter().map(|(word, &count)| (spell(word), count)).collect();
        let mut corpus = Self { words, counts: HashMap::new(), places: HashMap::new(), queue: BinaryHeap::new() };
        for index in 0..corpus.words.len() {
            corpus.enter(index);
        }
        corpus.queue = corpus.counts.iter().map(|(&pair, &count)| (count, Reverse(pair))).collect();
        corpus
    }

    fn most_frequent(&mut self, min_frequency: u64) -> Option<Pair> {
        while let Some((count, Reverse(pair))) = self.queue.pop() {
            let current = self.counts.get(&pair).copied().unwrap_or(0);
            if current == count && count > 0 {
                return (count >= min_frequency).then_some(pair);
            }
        }
        None
    }

    fn merge(&mut self, pair: Pair, id: u32) {
        let places = self.places.remove(&pair).unwrap_or_default();
        let mut touched = BTreeSet::new();
        for index in places {
            touched.extend(pairs(&self.words[index].0));
            self.leave(index);
            let word = &mut self.words[index].0;
            let mut merged = Vec::with_capacity(word.len());
            let mut at = 0;
            while at < word.len() {
                if at + 1 < word.len() && (word[at], word[at + 1]) == pair {
                    merged.push(id);
                    at += 2;
                } else {
                    merged.push(word[at]);
                    at += 1;
                }
            }
            *word = merged;
            touched.extend(pairs(&self.words[index].0));
            self.enter(index);
        }
        for pair in touched {
            if let Some(&count) = self.counts.get(&pair) {
                self.queue.push((count, Reverse(pair)));
            }
        }
    }

    /// Counts the pairs of a word in.
    fn enter(&mut self, index: usize) {
        let (word, count) = &self.words[index];
        for pair in pairs(word) {
            *self.counts.entry(pair).or_default() += count;
            self.places.entry(pair).or_default().insert(index);
        }
    }

    /// Counts the pairs of a word out.
    fn leave(&mut self, index: usize) {
        let (word, count) = &self.words[index];
        for pair in pairs(word) {
            if let Some(total) = self.counts.get_mut(&pair) {
                *total -= count;
                if *total == 0 {
                    self.counts.remove(&pair);
                }
            }
            if let Some(places) = self.places.get_mut(&pair) {
                places.remove(&index);
            }
        }
    }
}

fn pairs(word: &[u32]) -> impl Iterator<Item = Pair> + '_ {
    word.windows(2).map(|window| (window[0], window[1]))
}
