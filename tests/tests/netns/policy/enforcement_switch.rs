//! `disable_network_policy`, edited in the ConfigMap while connections live: off, everything passes; on, what is forbidden stops, and what is
//! allowed never notices.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use terway_sim::netns::NetNs;
use terway_sim::probe::{self, Echo, Traffic};

use super::stage::{Put as _, Stage};
use super::{SOON, with_stage};

/// By when an answer would have come: a retransmission that was backed off for as long as packets were dropped is on its way by then.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long silence is listened to.
const SILENCE: Duration = Duration::from_millis(400);

/// Edits the ConfigMap on every node, and returns when it is in force on each.
fn switch(stage: &mut Stage<'_>, enforced: bool) -> Result<()> {
    for node in stage.cluster.nodes() {
        node.set_key("disable_network_policy", if enforced { "false" } else { "true" })?;
    }
    for node in stage.cluster.nodes() {
        node.wait(SOON, "the switch is turned", |node| Ok(node.rpc()?.policies("")?.enforced == enforced))?;
    }
    Ok(())
}

/// A connection and a socket for datagrams to one pod.
struct Pair {
    stream: TcpStream,
    socket: UdpSocket,
    number: u64,
}

impl Pair {
    fn connect(ns: &NetNs, to: SocketAddr) -> Result<Self> {
        let (stream, socket) = ns.run(|| -> Result<_> {
            let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
            socket.connect(to)?;
            Ok((TcpStream::connect_timeout(&to, PATIENCE).context("connect")?, socket))
        })??;
        stream.set_nodelay(true)?;
        Ok(Self { stream, socket, number: 0 })
    }

    /// What was sent arrives and is answered; by TCP also what was held up before.
    fn passes(&mut self) -> Result<()> {
        self.number += 1;
        self.stream.write_all(&self.number.to_be_bytes())?;
        self.stream.set_read_timeout(Some(PATIENCE))?;
        let mut answer = [0; 8];
        while u64::from_be_bytes(answer) != self.number {
            self.stream.read_exact(&mut answer).context("the connection")?;
        }
        self.socket.set_read_timeout(Some(PATIENCE))?;
        self.socket.send(&self.number.to_be_bytes())?;
        ensure!(self.socket.recv(&mut answer).context("datagrams")? == 8 && u64::from_be_bytes(answer) == self.number);
        Ok(())
    }

    /// Nothing comes back.
    fn stands(&mut self) -> Result<()> {
        self.number += 1;
        self.stream.write_all(&self.number.to_be_bytes())?;
        self.socket.send(&self.number.to_be_bytes())?;
        let (mut answer, silence) = ([0; 8], [ErrorKind::WouldBlock, ErrorKind::TimedOut]);
        self.stream.set_read_timeout(Some(SILENCE))?;
        self.socket.set_read_timeout(Some(SILENCE))?;
        let (tcp, udp) = (self.stream.read(&mut answer), self.socket.recv(&mut answer));
        for outcome in [tcp, udp] {
            ensure!(outcome.as_ref().is_err_and(|error| silence.contains(&error.kind())), "{outcome:?}");
        }
        Ok(())
    }
}

#[test]
fn policy_enforcement_switch_under_traffic() -> Result<()> {
    with_stage(|stage, probes| {
        let mut objects = stage.base.clone();
        objects.policy(
            "x",
            "guard",
            &json!({
                "podSelector": {},
                "ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"ns": "z"}}}]}],
            }),
        );
        stage.publish(&objects)?;
        // On either node.
        let servers: Vec<Vec<SocketAddr>> = [0, 1]
            .map(|n: usize| stage.pods[n].1.ips.iter().map(|ip| SocketAddr::new(*ip, probe::PORT)).collect())
            .into();
        let _echoes = [Echo::start(&stage.pods[0].1.ns)?, Echo::start(&stage.pods[1].1.ns)?];
        let to = servers.concat();
        let mut allowed = Vec::new();
        for to in &to {
            allowed.push(Traffic::start(&stage.pods[6].1.ns, to.ip())?);
        }
        let stranger = |stage: &Stage<'_>| -> Result<Vec<Pair>> {
            to.iter().map(|to| Pair::connect(&stage.pods[3].1.ns, *to)).collect()
        };
        ensure!(probe::udp(&stage.pods[3].1.ns, to[0].ip(), 8).is_err(), "the policy is not in force");

        switch(stage, false)?;
        let mut forbidden = stranger(stage)?;
        let mut times = Vec::new();
        for round in 0..3 {
            for pair in &mut forbidden {
                pair.passes().with_context(|| format!("switched off, round {round}"))?;
            }
            let start = Instant::now();
            switch(stage, true)?;
            times.push(start.elapsed());
            for pair in &mut forbidden {
                pair.stands().with_context(|| format!("switched on, round {round}"))?;
            }
            super::compare(stage, probes, &objects, "switched on")?;
            switch(stage, false)?;
        }
        for pair in &mut forbidden {
            pair.passes().context("switched off at the end")?;
        }
        // Everybody reaches everybody, as without the policy.
        let base = stage.base.clone();
        super::compare(stage, probes, &base, "switched off")?;
        for traffic in allowed {
            let (tcp, udp) = traffic.stop()?;
            ensure!(tcp.lost == 0 && udp.lost == 0 && tcp.sent > 100, "what is allowed: TCP {tcp:?}, UDP {udp:?}");
        }
        println!("switched on within {times:?}");
        Ok(())
    })
}
