//! The conformance suite on the backends that need no launcher.

use std::sync::Arc;
use std::time::Duration;

use tandem_collective::{Collective, Solo, Tag, Threads, Topology, suite};

const DEADLINE: Duration = Duration::from_secs(60);

/// Runs `work` on every rank of `world`, each on its own thread, and returns what they return.
fn on_all<T: Send>(world: Vec<Arc<dyn Collective>>, work: impl Fn(&Arc<dyn Collective>) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let work = &work;
        let ranks: Vec<_> = world.into_iter().map(|rank| scope.spawn(move || work(&rank))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn solo_conforms() {
    let world: Arc<dyn Collective> = Arc::new(Solo::new());
    assert!(suite::conformance(&world) > 100);
}

#[test]
fn threads_conform() {
    for ranks in [1, 2, 3, 4, 8] {
        let checks = on_all(Threads::world(ranks, DEADLINE), suite::conformance);
        assert!(checks.iter().all(|&checks| checks > 100), "{checks:?}");
        println!("{ranks} ranks: {} checks each", checks[0]);
    }
}

#[test]
fn threads_on_pretended_nodes_conform() {
    on_all(Threads::with_topology(Topology::new(&[0, 1, 0, 1, 1]), DEADLINE), |world| {
        assert_eq!(world.topology().nodes(), 2);
        suite::conformance(world)
    });
}

/// Results too long for a cache are written in another way; they are the same.
#[test]
fn very_long_results_are_right() {
    const LENGTH: usize = (9 << 18) + 3;
    on_all(Threads::world(2, DEADLINE), |world| {
        let value = |rank: usize, i: usize| (i % 8191) as f32 * (rank as f32 + 0.3);
        let values: Vec<f32> = (0..2 * LENGTH).map(|i| value(world.rank(), i)).collect();
        let mut mine = vec![0.0; LENGTH];
        world.reduce_scatter_sum_f32(Tag::new("long", 0), &values, &mut mine).unwrap();
        let first = world.rank() * LENGTH;
        assert!((0..LENGTH).all(|i| mine[i] == value(0, first + i) + value(1, first + i)));
        let mut all = vec![0.0; 2 * LENGTH];
        world.all_gather_f32(Tag::new("long", 1), &mine, &mut all).unwrap();
        assert!((0..2 * LENGTH).all(|i| all[i] == value(0, i) + value(1, i)));
    });
}
