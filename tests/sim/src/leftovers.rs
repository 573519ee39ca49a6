//! What is there, taken down before and after: of the machine, which must never change, and of a node, which must be as before once
//! its pods are gone.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::netns::feed;
use crate::node::Node;

/// Facts by subject, each a line of text that a person can read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot(BTreeMap<&'static str, BTreeSet<String>>);

impl Snapshot {
    fn put(&mut self, subject: &'static str, facts: impl IntoIterator<Item = String>) {
        self.0.entry(subject).or_default().extend(facts);
    }

    fn lines(&mut self, subject: &'static str, text: &str) {
        self.put(subject, text.lines().map(stable).filter(|line| !line.is_empty()));
    }

    /// What `after` has more (`+`) and less (`-`) than `self`, by subject; nothing when they are equal.
    #[must_use]
    pub fn differences(&self, after: &Self) -> Option<String> {
        let mut text = String::new();
        let none = BTreeSet::new();
        for subject in self.0.keys().chain(after.0.keys()).copied().collect::<BTreeSet<_>>() {
            let (old, new) = (self.0.get(subject).unwrap_or(&none), after.0.get(subject).unwrap_or(&none));
            for (mark, fact) in
                new.difference(old).map(|fact| ('+', fact)).chain(old.difference(new).map(|fact| ('-', fact)))
            {
                let _ = writeln!(text, "{mark} {subject}: {fact}");
            }
        }
        if text.is_empty() { None } else { Some(text) }
    }
}

/// A line without what changes by itself: counters that run down, and blanks.
fn stable(line: &str) -> String {
    let mut words = Vec::new();
    let mut skip = false;
    for word in line.split_whitespace() {
        if skip {
            skip = false;
        } else if matches!(word, "expires" | "valid_lft" | "preferred_lft" | "age") {
            skip = true;
        } else {
            words.push(word.trim_end_matches('\\'));
        }
    }
    words.join(" ")
}

/// Takes down one network namespace through a function that runs a program in it.
fn network(snapshot: &mut Snapshot, run: impl Fn(&str, &[&str]) -> Result<String>) -> Result<()> {
    let links = run("ip", &["-o", "link", "show"])?;
    snapshot.lines("link", &links);
    snapshot.lines("address", &run("ip", &["-o", "address", "show"])?);
    for (subject, family) in [("IPv4 route", "-4"), ("IPv6 route", "-6")] {
        snapshot.lines(subject, &run("ip", &["-o", family, "route", "show", "table", "all"])?);
    }
    for (subject, family) in [("IPv4 rule", "-4"), ("IPv6 rule", "-6")] {
        snapshot.lines(subject, &run("ip", &[family, "rule", "show"])?);
    }
    for subject in ["address", "IPv6 route"] {
        // A NIC's link-local address is the kernel's own and comes and goes with carrier and DAD.
        snapshot.0.entry(subject).or_default().retain(|fact| !(fact.contains("fe80:") && fact.contains(" eth")));
    }
    // Learnt entries come and go; permanent ones were set by somebody.
    snapshot.lines("neighbour", &run("ip", &["-o", "neigh", "show", "nud", "permanent"])?);
    let qdiscs = run("tc", &["qdisc", "show"])?;
    snapshot.lines("qdisc", &qdiscs);
    for line in qdiscs.lines().filter(|line| line.contains("clsact")) {
        let Some(device) = line.split_whitespace().skip_while(|word| *word != "dev").nth(1) else { continue };
        for direction in ["ingress", "egress"] {
            // The link may be on its way out.
            let filters = run("tc", &["filter", "show", "dev", device, direction]).unwrap_or_default();
            snapshot.put("filter", filters.lines().map(|line| format!("{device} {direction} {}", stable(line))));
        }
    }
    Ok(())
}

/// The machine outside our namespaces. `ours` is the prefix of our own names: other sessions' namespaces, mounts in /tmp and cgroups
/// come and go beside us and are not ours to judge.
///
/// # Errors
/// When a program is missing or fails.
pub fn machine(ours: &str) -> Result<Snapshot> {
    let mut snapshot = Snapshot::default();
    network(&mut snapshot, |program, arguments| feed(Command::new(program).args(arguments), ""))?;
    snapshot.lines("nftables", &feed(Command::new("nft").args(["list", "ruleset"]), "")?);
    for key in [
        "net/ipv4/ip_forward",
        "net/ipv4/conf/all/rp_filter",
        "net/ipv4/conf/default/rp_filter",
        "net/ipv4/conf/all/proxy_arp",
        "net/ipv6/conf/all/forwarding",
        "net/ipv6/conf/default/forwarding",
        "net/ipv6/conf/all/disable_ipv6",
        "net/core/bpf_jit_enable",
        "net/core/somaxconn",
        "kernel/unprivileged_bpf_disabled",
    ] {
        if let Ok(value) = fs::read_to_string(Path::new("/proc/sys").join(key)) {
            snapshot.put("sysctl", [format!("{key} = {}", value.trim())]);
        }
    }
    let mine = |path: &str| path.contains(ours) || !(path.starts_with("/run/netns/") || path.starts_with("/tmp/"));
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("read the mounts")?;
    let mounts = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ');
        let (at, options) = (words.nth(4)?, words.next()?);
        let kind = line.split(" - ").nth(1)?.split(' ').next()?;
        mine(at).then(|| format!("{at} {kind} {options}"))
    });
    snapshot.put("mount", mounts);
    for folder in ["/run/netns", "/tmp"] {
        snapshot.put("file", names(folder).filter(|name| name.contains(ours)).map(|name| format!("{folder}/{name}")));
    }
    // Named by random ids; whose they are is told by the paths they hold.
    for (folder, inner) in [("/var/lib/cni/results", ""), ("/run/containerd/runc/k8s.io", "/state.json")] {
        let ours = names(folder)
            .map(|name| format!("{folder}/{name}{inner}"))
            .filter(|path| fs::read(path).is_ok_and(|content| String::from_utf8_lossy(&content).contains(ours)));
        snapshot.put("file", ours);
    }
    for hierarchy in names("/sys/fs/cgroup").chain([String::new()]) {
        let folder = format!("/sys/fs/cgroup/{hierarchy}");
        snapshot
            .put("cgroup", names(&folder).filter(|name| name.contains(ours)).map(|name| format!("{folder}/{name}")));
    }
    Ok(snapshot)
}

fn names(folder: &str) -> impl Iterator<Item = String> + use<> {
    fs::read_dir(folder).into_iter().flatten().filter_map(|entry| entry.ok()?.file_name().into_string().ok())
}

/// A node: its network, its pins, and what the daemon believes when it runs.
///
/// # Errors
/// When a program fails or the daemon does not answer.
pub fn node(node: &Node) -> Result<Snapshot> {
    let mut snapshot = Snapshot::default();
    network(&mut snapshot, |program, arguments| node.netns().output(program, arguments))?;
    let pins = node.bpffs();
    let mut found = Vec::new();
    walk(&pins, &mut found).with_context(|| format!("walk {}", pins.display()))?;
    snapshot.put("pin", found.into_iter().map(|path| path.replace(&*pins.to_string_lossy(), "")));
    let spool = node.work().join("state/del");
    snapshot.put("queued DEL", names(&spool.to_string_lossy()));
    if node.daemon_pid().is_some() {
        let mut daemon = node.rpc()?;
        let status = daemon.status()?;
        let (pool, datapath) = (status.pool.unwrap_or_default(), status.datapath.unwrap_or_default());
        snapshot.put("bound addresses", [pool.bound.to_string()]);
        snapshot.put("cooling addresses", [pool.cooling.to_string()]);
        snapshot.put("pending addresses", [pool.pending.to_string()]);
        snapshot.put("endpoints in maps", [datapath.endpoints.to_string()]);
        snapshot.put(
            "ENI",
            status.enis.iter().map(|eni| {
                format!(
                    "{} {} {} {}: {} addresses, {} bound",
                    eni.id, eni.mac, eni.ifname, eni.state, eni.addresses, eni.bound
                )
            }),
        );
        snapshot.put(
            "pod",
            daemon.list_pods()?.into_iter().map(|pod| {
                let key = pod.attachment.unwrap_or_default();
                format!("{} {} {} {:?}", key.container_id, key.ifname, pod.phase, pod.addresses)
            }),
        );
    }
    Ok(snapshot)
}

fn walk(folder: &Path, found: &mut Vec<String>) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        found.push(entry.path().to_string_lossy().into_owned());
        if entry.file_type()?.is_dir() {
            walk(&entry.path(), found)?;
        }
    }
    Ok(())
}

/// Waits until no trace of pods is left on a node that had none in `before`. ENIs and addresses may have been added meanwhile, for the
/// pool grows and shrinks as it likes; every ENI accounts for its own link, table, rules and pins.
///
/// # Errors
/// After `limit`, with what remains.
pub fn wait_until_pods_removed(node_: &Node, before: &Snapshot, limit: Duration) -> Result<()> {
    wait_until_equal(node_, before, limit, |snapshot| {
        let mut snapshot = snapshot.clone();
        let enis: BTreeSet<String> = snapshot
            .0
            .get("link")
            .into_iter()
            .flatten()
            .filter_map(|link| Some(link.split_whitespace().nth(1)?.split(['@', ':']).next()?.to_owned()))
            .filter(|name| name.strip_prefix("eth").is_some_and(|n| n != "0" && n.parse::<u32>().is_ok()))
            .collect();
        for subject in ["link", "address", "IPv4 route", "IPv6 route", "qdisc", "filter", "neighbour", "pin"] {
            if let Some(facts) = snapshot.0.get_mut(subject) {
                facts.retain(|fact| !fact.split([' ', ':', '@', '/', '-', '_', '.']).any(|word| enis.contains(word)));
            }
        }
        if let Some(pins) = snapshot.0.get_mut("pin") {
            pins.retain(|pin| !pin.contains("/eni-"));
        }
        for subject in ["ENI", "pending addresses"] {
            snapshot.0.remove(subject);
        }
        snapshot
    })
}

/// Waits until a node is again as it was in `before`: links are deleted in the background and addresses cool for a while.
///
/// # Errors
/// After `limit`, with the differences that remain.
pub fn wait_until_restored(node_: &Node, before: &Snapshot, limit: Duration) -> Result<()> {
    wait_until_equal(node_, before, limit, Snapshot::clone)
}

fn wait_until_equal(
    node_: &Node,
    before: &Snapshot,
    limit: Duration,
    view: impl Fn(&Snapshot) -> Snapshot,
) -> Result<()> {
    let deadline = Instant::now() + limit;
    let before = view(before);
    loop {
        let late = Instant::now() > deadline;
        match node(node_).map(|now| before.differences(&view(&now))) {
            Ok(None) => return Ok(()),
            Ok(Some(text)) if late => bail!("left on {}:\n{text}", node_.name()),
            Err(error) if late => return Err(error),
            Ok(Some(_)) | Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_name_subject_and_direction() {
        let mut before = Snapshot::default();
        before.lines("route", "default via 10.0.0.253 dev eth0 expires 17sec\n10.0.0.0/24 dev eth0 \n");
        let mut after = Snapshot::default();
        after.lines("route", "default via 10.0.0.253 dev eth0 expires 3sec\n");
        after.lines("link", "7: cali0 mtu 1500");
        assert_eq!(before.differences(&before), None);
        let text = before.differences(&after).unwrap();
        assert_eq!(text, "+ link: 7: cali0 mtu 1500\n- route: 10.0.0.0/24 dev eth0\n");
    }

    #[test]
    fn the_machine_can_be_taken_down() {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIP: needs root");
            return;
        }
        let before = machine("no-such-prefix").unwrap();
        assert!(before.0["link"].iter().any(|link| link.contains("lo:")) && !before.0["mount"].is_empty());
        assert_eq!(before.differences(&machine("no-such-prefix").unwrap()), None);
    }
}
