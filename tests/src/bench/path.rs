//! `path`: what a pod-to-pod packet costs, on one node and across nodes, against a routed veth pair without eBPF and loopback.

use std::time::Duration;

use anyhow::Result;
use terway_sim::netns::{NetNs, feed};
use terway_sim::node::cni::Pod;

use crate::figures::{Bar, Better, Figure, percentile};
use crate::load::{Ends, Kind, run};

/// CPU both ends are pinned to.
const CPU: usize = 1;

/// Rounds of each path and kind; the figure is their median.
const ROUNDS: usize = 7;

/// Length of a round. Long enough that its start does not count, short enough that drift hits all paths alike.
const ROUND: Duration = Duration::from_millis(600);

/// Two ways measured one right after the other, so many times.
#[derive(Clone, Copy, Debug)]
pub struct Turns {
    /// How many.
    pub count: usize,
    /// Of each round.
    pub length: Duration,
}

/// Of a path that has a bar and its anchor: rounds of one path differ by a tenth on a machine that is somebody's guest, and the bars are about
/// a twentieth.
const TURNS: Turns = Turns { count: 60, length: Duration::from_millis(250) };

/// Two pods behind a router, all plain veth and kernel routing: what a user without an eBPF datapath has.
#[derive(Debug)]
pub struct Routed {
    client: NetNs,
    server: NetNs,
    router: NetNs,
}

impl Routed {
    /// The server's address.
    pub const SERVER: [u8; 4] = [10, 99, 1, 2];

    /// Makes the three namespaces, with names that begin with `prefix`.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn create(prefix: &str) -> Result<Self> {
        let router = NetNs::create(&format!("{prefix}-r"))?;
        let client = NetNs::create(&format!("{prefix}-c"))?;
        let server = NetNs::create(&format!("{prefix}-s"))?;
        router.sysctl(&[("ipv4/ip_forward", "1")])?;
        for (pod, link, address) in [(&client, "vc", "10.99.0.2"), (&server, "vs", "10.99.1.2")] {
            router.ip(&format!(
                "link add {link} type veth peer name eth0 netns {}\nlink set {link} up\naddr add 169.254.1.1/32 dev {link}\nroute add {address}/32 dev {link}\n",
                pod.name()
            ))?;
            pod.ip(&format!(
                "addr add {address}/32 dev eth0\nlink set eth0 up\nroute add 169.254.1.1 dev eth0\nroute add default via 169.254.1.1\n"
            ))?;
        }
        Ok(Self { client, server, router })
    }

    /// Gives the router's firewall a set of rules.
    ///
    /// # Errors
    /// The words of `program`.
    pub fn rules(&self, program: &str, args: &[&str], rules: &str) -> Result<()> {
        let mut command = self.router.command(program);
        command.args(args);
        feed(&mut command, rules).map(drop)
    }

    /// The ends of the path.
    #[must_use]
    pub fn ends(&self) -> Ends {
        Ends {
            client: self.client.path().to_owned(),
            server: self.server.path().to_owned(),
            address: Self::SERVER.into(),
            cgroup: None,
        }
    }

    /// The server reaching itself: no path at all, the limit.
    #[must_use]
    pub fn loopback(&self) -> Ends {
        Ends {
            client: self.server.path().to_owned(),
            server: self.server.path().to_owned(),
            address: [127, 0, 0, 1].into(),
            cgroup: None,
        }
    }
}

/// A path of ours with the ratio it must reach against the routed pair, by kind.
#[derive(Debug)]
pub struct Path {
    /// Name in the figure.
    pub name: &'static str,
    /// Its ends.
    pub ends: Ends,
    /// Least ratio for request/response and for connect/request/response; none when the path has no counterpart.
    pub bars: Option<(f64, f64)>,
}

/// The paths between three pods, two of them on one node.
///
/// # Errors
/// When a pod lacks a family.
pub fn paths(client: &Pod, near: &Pod, far: &Pod) -> Result<Vec<Path>> {
    let ends = |to: &Pod, address| Ends {
        client: client.ns.path().to_owned(),
        server: to.ns.path().to_owned(),
        address,
        cgroup: None,
    };
    Ok(vec![
        Path { name: "same_node_v4", ends: ends(near, near.v4()?), bars: Some((1.1, 1.05)) },
        Path { name: "same_node_v6", ends: ends(near, near.v6()?), bars: None },
        Path { name: "cross_node_v4", ends: ends(far, far.v4()?), bars: None },
    ])
}

/// Measures `paths` against the anchors.
///
/// # Errors
/// When a path does not carry the traffic.
pub fn measure(paths: &[Path], routed: &Routed) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for kind in Kind::ALL {
        let mut ours = vec![Vec::new(); paths.len()];
        let (mut raw, mut loopback) = (Vec::new(), Vec::new());
        for round in 0..=ROUNDS {
            let sample = |into: &mut Vec<f64>, ends: &Ends| -> Result<()> {
                let figure = run(kind, ends, CPU, ROUND)?;
                // The first round fills neighbour tables, flow tables and caches.
                if round > 0 {
                    into.push(figure);
                }
                Ok(())
            };
            for (into, path) in ours.iter_mut().zip(paths) {
                sample(into, &path.ends)?;
                sample(&mut raw, &routed.ends())?;
            }
            sample(&mut loopback, &routed.loopback())?;
        }
        let (raw, loopback) = (percentile(&raw, 50.0), percentile(&loopback, 50.0));
        let unit = if kind == Kind::TcpStream { "bytes_per_s" } else { "per_s" };
        for (rounds, path) in ours.iter().zip(paths) {
            let bar = match (kind, path.bars) {
                (Kind::TcpRr, Some((rr, _))) => Bar::Ratio(rr),
                (Kind::TcpCrr, Some((_, crr))) => Bar::Ratio(crr),
                _ => Bar::None,
            };
            let (value, beside) = match bar {
                Bar::None => (percentile(rounds, 50.0), raw),
                _ => in_turns(kind, &path.ends, &routed.ends(), TURNS)?,
            };
            for (anchor, anchor_value, bar) in [("routed veth", beside, bar), ("loopback", loopback, Bar::None)] {
                figures.push(Figure {
                    bench: "path",
                    name: format!("{}_{}_{unit}", path.name, kind.name()),
                    value,
                    anchor: Some((anchor, anchor_value)),
                    better: Better::More,
                    bars: vec![bar],
                });
            }
        }
    }
    Ok(figures)
}

/// Medians of a path and of its anchor, measured in turns that change places each time.
///
/// # Errors
/// When one of them does not carry the traffic.
pub fn in_turns(kind: Kind, path: &Ends, anchor: &Ends, turns: Turns) -> Result<(f64, f64)> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for turn in 0..turns.count {
        let mut both = [(path, &mut ours), (anchor, &mut theirs)];
        both.rotate_left(turn % 2);
        for (ends, into) in both {
            into.push(run(kind, ends, CPU, turns.length)?);
        }
    }
    Ok((percentile(&ours, 50.0), percentile(&theirs, 50.0)))
}
