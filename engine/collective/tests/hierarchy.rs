//! Node-by-node calls on pretended machines: same results, fewer bytes between machines.

use std::sync::Arc;
use std::time::Duration;

use half::bf16;
use tandem_collective::{Collective, Hierarchical, Tag, Threads, Topology};

const DEADLINE: Duration = Duration::from_secs(60);

/// Runs `work` on every rank of a world that believes in `nodes`, with the flat and the staged communicator.
fn on_all(nodes: &[usize], work: impl Fn(&Arc<dyn Collective>, &Arc<Hierarchical>) + Sync) {
    std::thread::scope(|scope| {
        for flat in Threads::with_topology(Topology::new(nodes), DEADLINE) {
            let work = &work;
            scope.spawn(move || {
                let staged = Hierarchical::new(Arc::clone(&flat)).unwrap();
                work(&flat, &staged);
            });
        }
    });
}

/// Numbers whose sum shows the order of additions.
fn numbers(rank: usize, length: usize) -> Vec<f32> {
    (0..length)
        .map(|i| ((i * 7919 + rank * 104_729) % 1009) as f32 * 10_f32.powi((rank as i32 * 3 + i as i32) % 7))
        .collect()
}

#[test]
fn aligned_nodes_give_the_bits_of_the_flat_tree() {
    for nodes in [&[0, 0, 1, 1][..], &[0, 0, 1, 1, 2, 2], &[0, 0, 0, 0, 1, 1, 1, 1]] {
        on_all(nodes, |flat, staged| {
            let (world, rank) = (flat.world(), flat.rank());
            for (call, length) in [1, 1500, 4097, 20_001].into_iter().enumerate() {
                let tag = Tag::new("bits", call as u64);
                let mut expected = numbers(rank, length);
                let mut got = expected.clone();
                flat.all_reduce_sum_f32(tag, &mut expected).unwrap();
                staged.all_reduce_sum_f32(tag, &mut got).unwrap();
                assert!(expected.iter().zip(&got).all(|(one, other)| one.to_bits() == other.to_bits()));

                let narrow = |values: &[f32]| values.iter().map(|&value| bf16::from_f32(value)).collect::<Vec<_>>();
                let mut expected = narrow(&numbers(rank, length));
                let mut got = expected.clone();
                flat.all_reduce_sum_bf16(tag, &mut expected).unwrap();
                staged.all_reduce_sum_bf16(tag, &mut got).unwrap();
                assert_eq!(expected, got);

                let values = numbers(rank, length * world);
                let (mut expected, mut got) = (vec![0.0; length], vec![0.0; length]);
                flat.reduce_scatter_sum_f32(tag, &values, &mut expected).unwrap();
                staged.reduce_scatter_sum_f32(tag, &values, &mut got).unwrap();
                assert_eq!(expected, got);

                let values = narrow(&values);
                let (mut expected, mut got) = (vec![bf16::ZERO; length], vec![bf16::ZERO; length]);
                flat.reduce_scatter_sum_bf16(tag, &values, &mut expected).unwrap();
                staged.reduce_scatter_sum_bf16(tag, &values, &mut got).unwrap();
                assert_eq!(expected, got);
            }
        });
    }
}

#[test]
fn bytes_arrive_in_rank_order_however_ranks_lie_on_nodes() {
    for nodes in [&[0, 0, 1, 1][..], &[0, 1, 0, 1, 0, 1], &[2, 1, 1, 2, 0, 0], &[0, 0, 1], &[0, 1, 2], &[0, 0]] {
        on_all(nodes, |flat, staged| {
            let world = flat.world();
            for length in [0, 3, 5000, 30_001] {
                let bytes = |rank: usize| (0..length).map(|i| (i * 31 + rank * 7) as u8).collect::<Vec<u8>>();
                let mut all = vec![0; length * world];
                staged.all_gather(Tag::new("gather", 0), &bytes(flat.rank()), &mut all).unwrap();
                assert_eq!(all, (0..world).flat_map(bytes).collect::<Vec<_>>());
                for root in 0..world {
                    let mut mine = bytes(flat.rank());
                    staged.broadcast(Tag::new("broadcast", root as u64), &mut mine, root).unwrap();
                    assert_eq!(mine, bytes(root));
                }
            }
        });
    }
}

#[test]
fn sums_on_other_layouts_are_close_and_equal_on_all_ranks() {
    on_all(&[0, 1, 2, 0, 1, 2, 0, 1, 2], |flat, staged| {
        let tag = Tag::new("layout", 0);
        let mut expected = numbers(flat.rank(), 5000);
        let mut got = expected.clone();
        flat.all_reduce_sum_f32(tag, &mut expected).unwrap();
        staged.all_reduce_sum_f32(tag, &mut got).unwrap();
        assert!(expected.iter().zip(&got).all(|(one, other)| (one - other).abs() <= 1e-6 * one.abs()));
        let mut first = got.clone();
        flat.broadcast(tag, tandem_collective::as_bytes_mut(&mut first), 0).unwrap();
        assert_eq!(first, got);
    });
}

#[test]
fn less_crosses_between_nodes() {
    let nodes = [0, 0, 0, 0, 1, 1, 1, 1];
    let (world, places, count) = (8_u64, 4_u64, 2_u64);
    on_all(&nodes, |flat, staged| {
        // A multiple of ranks and cache lines, so that all shares are equal.
        let n = 81_920_u64;
        // What this rank sends to each of the other machine's ranks in a flat call is its traffic spread over all peers.
        let crossing = |bytes: u64| bytes / (world - 1) * (world - places);
        let compare = |what: &str, expected_bytes: u64, call: &dyn Fn(&dyn Collective)| {
            let (flat_before, rail_before) = (flat.traffic(), staged.rail_traffic());
            call(&**flat);
            let flat_bytes = crossing(flat.traffic().since(flat_before).sent_bytes);
            call(&**staged);
            let rail_bytes = staged.rail_traffic().since(rail_before).sent_bytes;
            assert_eq!(rail_bytes, expected_bytes, "{what}");
            assert_eq!(rail_bytes * places, flat_bytes, "{what}");
        };
        let length = n as usize;
        compare("all_gather", (count - 1) * n, &|world| {
            world.all_gather(Tag::new("bytes", 0), &vec![1; length], &mut vec![0; length * 8]).unwrap();
        });
        compare("reduce_scatter", (count - 1) * n / 8 * 4, &|world| {
            let mut mine = vec![0.0; length / 8];
            world.reduce_scatter_sum_f32(Tag::new("bytes", 1), &vec![1.0; length], &mut mine).unwrap();
        });
        compare("all_reduce", 2 * (n / places) / count * (count - 1) * 4, &|world| {
            world.all_reduce_sum_f32(Tag::new("bytes", 2), &mut vec![1.0; length]).unwrap();
        });
        assert!(staged.traffic().sent_bytes > flat.traffic().sent_bytes, "the whole traffic has all levels in it");
    });
}

#[test]
fn the_staged_communicator_conforms_where_its_tree_is_the_flat_one() {
    // Traffic is another by design, so the sizes of the suite are not asked of it; everything else is.
    on_all(&[0, 0, 1, 1], |_, staged| {
        let world: Arc<dyn Collective> = Arc::clone(staged) as _;
        assert!(tandem_collective::suite::results(&world) > 100);
    });
}
