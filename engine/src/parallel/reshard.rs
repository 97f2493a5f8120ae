//! From one layout to another: which elements go from which rank to which.
//!
//! A unit's elements are numbered as in the buffer of a rank that holds all pieces. Whoever holds a part of it, in training
//! or in generation, says so in these numbers; what has to move follows from two such statements alone.

use std::ops::Range;

use super::slice::Slicing;
use crate::model::unit::UnitLayout;

/// What one rank holds of a unit, or needs of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holding {
    /// Elements in the common numbers, and where the first of them lies in the rank's own buffer. In order, without overlap.
    pub runs: Vec<(Range<usize>, usize)>,
}

/// Elements that go from one rank to another, or stay where they are if the ranks are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// The rank that has them.
    pub from: usize,
    /// The rank that needs them.
    pub to: usize,
    /// First element in the buffer of `from`.
    pub source: usize,
    /// First element in the buffer of `to`.
    pub target: usize,
    /// Elements.
    pub len: usize,
}

impl Holding {
    /// All of what a layout holds.
    pub fn of(layout: &UnitLayout) -> Self {
        let run = |section: &crate::model::unit::Section| {
            (section.common_start..section.common_start + section.len, section.start)
        };
        Self { runs: layout.sections.iter().map(run).filter(|(range, _)| !range.is_empty()).collect() }
    }

    /// The slice of `rank` of what a layout holds; places are those inside the slice.
    pub fn slice_of(layout: &UnitLayout, slicing: Slicing, rank: usize) -> Self {
        let slice = slicing.range(rank);
        let runs = layout.sections.iter().filter_map(|section| {
            let (start, end) = (section.start.max(slice.start), (section.start + section.len).min(slice.end));
            let common = section.common_start + start.saturating_sub(section.start);
            (start < end).then(|| (common..common + (end - start), start - slice.start))
        });
        Self { runs: runs.collect() }
    }

    /// The part of `wanted` that is held here: its range, and where it lies.
    fn find(&self, wanted: &Range<usize>) -> Option<(Range<usize>, usize)> {
        self.runs.iter().find_map(|(range, place)| {
            let (start, end) = (range.start.max(wanted.start), range.end.min(wanted.end));
            (start < end).then(|| (start..end, place + (start - range.start)))
        })
    }
}

/// The copies that give every rank what it needs. What a rank has already stays; what it lacks comes from the rank nearest to
/// it that has it, so no plan moves fewer elements. `None` if some element is held nowhere.
pub fn plan(held: &[Holding], needed: &[Holding]) -> Option<Vec<Transfer>> {
    let mut copies = Vec::new();
    for (to, needs) in needed.iter().enumerate() {
        let mut near: Vec<usize> = (0..held.len()).collect();
        near.sort_by_key(|&from| (from.abs_diff(to), from));
        for (range, place) in &needs.runs {
            let mut open = vec![range.clone()];
            for &from in &near {
                let mut rest = Vec::new();
                while let Some(wanted) = open.pop() {
                    match held[from].find(&wanted) {
                        None => rest.push(wanted),
                        Some((found, source)) => {
                            let target = place + (found.start - range.start);
                            copies.push(Transfer { from, to, source, target, len: found.len() });
                            let sides = [wanted.start..found.start, found.end..wanted.end];
                            open.extend(sides.into_iter().filter(|side| !side.is_empty()));
                        }
                    }
                }
                open = rest;
            }
            if !open.is_empty() {
                return None;
            }
        }
    }
    copies.sort_by_key(|copy| (copy.from, copy.to, copy.target));
    Some(copies)
}

/// Elements that must come to `rank` from others: those that it needs and does not hold.
pub fn moved_elements(held: &Holding, needed: &Holding) -> usize {
    let total: usize = needed.runs.iter().map(|(range, _)| range.len()).sum();
    let overlap = |a: &Range<usize>, b: &Range<usize>| a.end.min(b.end).saturating_sub(a.start.max(b.start));
    let own = needed.runs.iter().flat_map(|(n, _)| held.runs.iter().map(move |(h, _)| overlap(n, h)));
    total - own.sum::<usize>()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holding(runs: &[(Range<usize>, usize)]) -> Holding {
        Holding { runs: runs.to_vec() }
    }

    #[test]
    fn every_element_arrives_once_and_nothing_moves_that_need_not() {
        // Four slices of 100 elements; two ranks need 0..60 (one shared part and a piece), two need 0..20 and 60..100.
        let held: Vec<Holding> = (0..4).map(|rank| holding(&[(rank * 25..rank * 25 + 25, 0)])).collect();
        let first = holding(&[(0..20, 0), (20..60, 20)]);
        let second = holding(&[(0..20, 0), (60..100, 20)]);
        let needed = [first.clone(), second.clone(), first, second];
        let copies = plan(&held, &needed).unwrap();
        for (to, needs) in needed.iter().enumerate() {
            let mut buffer = [usize::MAX; 60];
            for copy in copies.iter().filter(|copy| copy.to == to) {
                for offset in 0..copy.len {
                    let slot = &mut buffer[copy.target + offset];
                    assert_eq!(*slot, usize::MAX, "written twice");
                    *slot = held[copy.from].runs[0].0.start + copy.source + offset;
                }
            }
            let wanted: Vec<usize> = needs.runs.iter().flat_map(|(range, _)| range.clone()).collect();
            assert_eq!(buffer.to_vec(), wanted);
            let moved: usize = copies.iter().filter(|c| c.to == to && c.from != to).map(|c| c.len).sum();
            assert_eq!(moved, moved_elements(&held[to], needs));
        }
        assert_eq!(plan(&held[1..], &needed), None, "the first elements are held nowhere");
    }
}
