//! Sampling from a row in shards: the token of the uncut row, and the same bits whoever holds which shard.

mod common;

use common::{random, values};
use tandem_kernels::logprob::{HeadPartial, head_finish, head_partials, logits};
use tandem_kernels::rng::{Philox, Purpose};
use tandem_kernels::sample::{
    Candidate, ChosenBlock, Exchange, Sampled, SamplingParams, ShardDraw, ShardSummary, choose_block, choose_candidate,
    finish, sample_row, sample_row_gathered, sample_row_sharded,
};

const VOCABULARY: usize = 2900;
/// Cuts into one to five shards; ragged at the end, and with shards that have no entries.
const CUTS: [&[usize]; 5] =
    [&[0, 2900], &[0, 1536, 2900], &[0, 512, 2048, 2900], &[0, 0, 2560, 2900, 2900], &[0, 512, 1024, 1536, 2048, 2900]];

fn uniform(index: u64) -> f64 {
    Philox::new(8, Purpose::Sample, 0).uniform(index, 0, 0)
}

/// Parameters whose support is the whole vocabulary, and greedy.
fn untruncated() -> Vec<SamplingParams> {
    let plain = SamplingParams::default();
    vec![
        plain,
        SamplingParams::greedy(),
        SamplingParams { repetition_penalty: 1.4, ..SamplingParams::greedy() },
        SamplingParams { temperature: 0.6, ..plain },
        SamplingParams { temperature: f32::MIN_POSITIVE, ..plain },
        SamplingParams { temperature: 1e4, repetition_penalty: 0.7, ..plain },
        SamplingParams { temperature: 1.7, repetition_penalty: 1.3, ..plain },
    ]
}

fn truncated() -> Vec<SamplingParams> {
    let plain = SamplingParams::default();
    vec![
        SamplingParams { top_k: 1, ..plain },
        SamplingParams { top_k: 40, temperature: 1.2, ..plain },
        SamplingParams { top_k: 2900, ..plain },
        SamplingParams { top_k: 700, top_p: 0.9, repetition_penalty: 1.2, ..plain },
        SamplingParams { min_p: 0.05, ..plain },
        SamplingParams { min_p: 1.0, ..plain },
        SamplingParams { top_k: 20, min_p: 0.2, temperature: 0.8, ..plain },
        SamplingParams { top_p: 0.8, ..plain },
        SamplingParams { top_p: 0.95, min_p: 0.02, temperature: 1.5, ..plain },
    ]
}

fn normal(sample: u64, std: f64) -> Vec<f32> {
    let mut row = vec![0f32; VOCABULARY];
    Philox::new(9, Purpose::Init, 0).fill_normal(sample, 0, std, &mut row);
    row
}

/// Rows that are ordinary, tied, flat, peaked, and as large as floats go.
fn rows() -> Vec<Vec<f32>> {
    let ties = values(VOCABULARY, 3).iter().map(|value| (value * 3.0).round()).collect();
    let peaks = (0..VOCABULARY).map(|v| if v % 600 == 599 { 20.0 } else { -30.0 }).collect();
    let extreme = values(VOCABULARY, 4).iter().map(|value| value * f32::MAX * 0.49).collect();
    let signed_zeros = (0..VOCABULARY).map(|v| if v % 3 == 0 { -0.0 } else { 0.0 }).collect();
    vec![normal(1, 1.0), normal(2, 8.0), ties, vec![0.25; VOCABULARY], peaks, extreme, signed_zeros]
}

fn history() -> Vec<u32> {
    (0..200).map(|index| (index * index * 7) % VOCABULARY as u32).collect()
}

fn shards<'a>(row: &'a [f32], cuts: &[usize]) -> Vec<&'a [f32]> {
    cuts.windows(2).map(|range| &row[range[0]..range[1]]).collect()
}

fn sampled_bits(sampled: &Sampled) -> (u32, [u32; 3]) {
    (sampled.token, [sampled.logp, sampled.sampling_logp, sampled.entropy].map(f32::to_bits))
}

/// The row's draw as ranks take it: each sees its own shards and what was sent to it, all of it as f64.
fn by_phases(row: &[f32], cuts: &[usize], history: &[u32], params: &SamplingParams, uniform: f64) -> Sampled {
    let draws: Vec<ShardDraw> = cuts
        .windows(2)
        .map(|range| ShardDraw::new(&row[range[0]..range[1]], range[0], VOCABULARY, history, params).unwrap())
        .collect();
    // Computed last shard first, merged in order of entries.
    let mut sent: Vec<[f64; 8]> = draws.iter().rev().map(|draw| draw.summary().to_array()).collect();
    sent.reverse();
    let summary = sent.into_iter().map(ShardSummary::from_array).fold(ShardSummary::EMPTY, ShardSummary::merge);
    let (token, total) = match params.exchange() {
        Exchange::Nothing => (summary.best, f64::NAN),
        Exchange::BlockSums => {
            let sums: Vec<f64> = draws.iter().flat_map(|draw| draw.block_sums(&summary)).collect();
            let chosen = choose_block(&sums, uniform).unwrap();
            let owners: Vec<Candidate> =
                draws.iter().filter_map(|draw| draw.token_in_block(&summary, &chosen)).collect();
            assert_eq!(owners.len(), 1, "exactly one shard holds a block");
            (Candidate::from_array(owners[0].to_array()), chosen.total)
        }
        Exchange::Candidates => {
            let sent = draws.iter().flat_map(|draw| draw.candidates(&summary));
            let candidates: Vec<Candidate> = sent.map(|one| Candidate::from_array(one.to_array())).collect();
            choose_candidate(&candidates, VOCABULARY, &summary, params, uniform).unwrap()
        }
        Exchange::Row => return sample_row_gathered(row, &summary, history, params, uniform).unwrap(),
    };
    finish(&summary, token, total, params)
}

#[test]
fn one_shard_is_the_uncut_row() {
    for row in rows() {
        for params in untruncated().into_iter().chain(truncated()) {
            for u in (0..20).map(uniform).chain([0.0, 1.0 - f64::EPSILON / 2.0]) {
                let whole = sample_row(&row, &history(), &params, u).unwrap();
                let one = sample_row_sharded(&[&row], &history(), &params, u).unwrap();
                assert_eq!(sampled_bits(&whole), sampled_bits(&one), "{params:?} {u}");
                assert_eq!(sampled_bits(&whole), sampled_bits(&by_phases(&row, CUTS[0], &history(), &params, u)));
            }
        }
    }
}

/// The sums of blocks and the candidates are the same numbers wherever they were made, so the token is the same too.
#[test]
fn cuts_do_not_change_the_token() {
    for (index, row) in rows().iter().enumerate() {
        for params in untruncated().into_iter().chain(truncated()) {
            for u in (0..30).map(uniform).chain([0.0, 1.0 - f64::EPSILON / 2.0]) {
                let whole = sample_row(row, &history(), &params, u).unwrap();
                for cuts in CUTS {
                    let got = sample_row_sharded(&shards(row, cuts), &history(), &params, u).unwrap();
                    assert_eq!(got.token, whole.token, "row {index} {cuts:?} {params:?} {u}");
                    if !params.is_plain() {
                        assert_eq!(got.sampling_logp, whole.sampling_logp, "row {index} {cuts:?} {params:?} {u}");
                    }
                    for (got, want) in [(got.logp, whole.logp), (got.entropy, whole.entropy)] {
                        assert!((got - want).abs() <= 2e-6 * (1.0 + want.abs()), "row {index} {cuts:?}: {got} {want}");
                    }
                }
            }
        }
    }
}

/// Bitwise: shards on ranks of their own, with every number sent, and all shards on one rank.
#[test]
fn who_holds_a_shard_does_not_matter() {
    for row in rows() {
        for params in untruncated().into_iter().chain(truncated()) {
            for u in (0..10).map(uniform) {
                for cuts in CUTS {
                    let here = sample_row_sharded(&shards(&row, cuts), &history(), &params, u).unwrap();
                    let apart = by_phases(&row, cuts, &history(), &params, u);
                    assert_eq!(sampled_bits(&here), sampled_bits(&apart), "{cuts:?} {params:?} {u}");
                }
            }
        }
    }
}

/// What is recorded while sampling from shards is what training computes with the same shards, bit for bit.
#[test]
fn log_probs_are_those_of_the_sharded_head() {
    let (rows, width) = (6, 24);
    let (h, w) = (random(&[rows, width], 1), (random(&[VOCABULARY, width], 2) * 0.6).unwrap());
    for cuts in CUTS {
        let parts: Vec<_> = cuts
            .windows(2)
            .map(|range| (range[0], w.narrow(0, range[0], range[1] - range[0]).unwrap().copy().unwrap()))
            .collect();
        let stored: Vec<Vec<Vec<f32>>> =
            parts.iter().map(|(_, w)| logits(&h, w, None).unwrap().to_vec2().unwrap()).collect();
        for params in untruncated().into_iter().chain(truncated()) {
            let sampled: Vec<Sampled> = (0..rows)
                .map(|row| {
                    let shards: Vec<&[f32]> = stored.iter().map(|shard| shard[row].as_slice()).collect();
                    sample_row_sharded(&shards, &history(), &params, uniform(row as u64)).unwrap()
                })
                .collect();
            let tokens: Vec<u32> = sampled.iter().map(|sampled| sampled.token).collect();
            let mut merged = vec![HeadPartial::EMPTY; rows];
            for (first_entry, w) in &parts {
                let partials = head_partials(&h, w, None, *first_entry, &tokens, 1.0).unwrap();
                merged.iter_mut().zip(partials).for_each(|(seen, shard)| *seen = seen.merge(shard));
            }
            let out = head_finish(&merged, 1.0).unwrap();
            let (logp, entropy) = (out.logp.to_vec1::<f32>().unwrap(), out.entropy.to_vec1::<f32>().unwrap());
            for (row, got) in sampled.iter().enumerate() {
                assert_eq!(got.logp.to_bits(), logp[row].to_bits(), "{cuts:?} {params:?}");
                assert_eq!(got.entropy.to_bits(), entropy[row].to_bits(), "{cuts:?} {params:?}");
            }
        }
    }
}

/// Over many draws each block is found as often as its sum says, so the two levels of the choice fit together.
#[test]
fn draws_follow_the_block_sums() {
    let (row, params) = (normal(5, 1.0), SamplingParams::default());
    let draw = ShardDraw::new(&row, 0, VOCABULARY, &[], &params).unwrap();
    let summary = draw.summary();
    let sums = draw.block_sums(&summary);
    let total: f64 = sums.iter().sum();
    let (mut counts, draws) = (vec![0f64; sums.len()], 20_000);
    for index in 0..draws {
        let token = sample_row_sharded(&shards(&row, CUTS[2]), &[], &params, uniform(index)).unwrap().token;
        counts[token as usize / 512] += 1.0;
    }
    for (count, sum) in counts.iter().zip(&sums) {
        let mean = sum / total * draws as f64;
        assert!((count - mean).abs() < 5.0 * mean.sqrt(), "{counts:?}");
    }
}

#[test]
fn refusals_say_what_is_wrong() {
    let plain = SamplingParams::default();
    let row = [0.0f32; 600];
    let open = |logits: &[f32], first, history: &[u32], params: &SamplingParams| {
        ShardDraw::new(logits, first, 1200, history, params).unwrap_err().to_string()
    };
    assert_eq!(open(&row, 100, &[], &plain), "sample_shard: first_entry must be a multiple of 512, got 100");
    assert!(open(&row, 1024, &[], &plain).contains("last entry of the shard 1623 is out of range (limit 1200)"));
    assert!(open(&[0.0, f32::NAN], 512, &[], &plain).contains("the logit of token 513 is NaN"));
    assert!(open(&row, 512, &[1200], &plain).contains("token of the history 1200 is out of range"));
    assert!(open(&row, 512, &[], &SamplingParams { top_p: 0.0, ..plain }).contains("top_p"));
    let cut_inside = sample_row_sharded(&[&row, &row], &[], &plain, 0.5).unwrap_err().to_string();
    assert_eq!(cut_inside, "sample_row_sharded: first_entry must be a multiple of 512, got 600");
    assert!(sample_row_sharded(&[], &[], &plain, 0.5).unwrap_err().to_string().contains("at least one"));
    assert!(sample_row_sharded(&[&row], &[], &plain, 1.0).unwrap_err().to_string().contains("uniform must be in"));
    assert!(choose_block(&[], 0.5).unwrap_err().to_string().contains("at least one"));
    assert_eq!(choose_block(&[1.0, 3.0], 0.5).unwrap(), ChosenBlock { block: 1, rest: 1.0 / 3.0, total: 4.0 });
}
