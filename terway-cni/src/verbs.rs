//! The CNI verbs that call the daemon: they encode the request and decode the answer.

use std::time::Instant;

use serde_json::Value;
use terway_core::cni::conf::Options;
use terway_core::cni::env::Target;
use terway_core::cni::queue::QueuedDel;
use terway_core::cni::result::{Attached, CniResult, Interface, IpConfig, Route};
use terway_core::cni::{Failure, NetConf, Request};
use terway_core::errors::{CNI_CONFIG, Error, INTERNAL, NOT_READY};
use terway_core::ident::AttachmentKey;
use terway_proto::v1::{
    AddPodRequest, Attachment, Bandwidth, CheckPodRequest, DelPodRequest, ErrorDetail, GcPodsRequest, Network, Pod,
    PortMapping, StatusRequest,
};

use crate::client::{Budget, CallError, call};
use crate::{netns, spool};

/// CNI code of STATUS for a node that cannot take pods (specification 1.1.0, "Error").
const NOT_AVAILABLE: u32 = 50;
/// CNI code of STATUS for a node whose present pods may be cut off.
const LIMITED: u32 = 51;

/// Carries out `request` and returns the document for stdout, if it has one.
///
/// # Errors
/// The CNI error for the runtime.
pub(crate) fn run(request: &Request, conf: &NetConf, started: Instant) -> Result<Option<Value>, Failure> {
    let budget = Budget::new(request.verb(), conf, started);
    let verb = async {
        match request {
            Request::Add(target) => add(target, conf, budget).await.map(Some),
            Request::Del(target) => del(target, conf, budget).await.map(|()| None),
            Request::Check(target) => check(target, conf, budget).await.map(|()| None),
            Request::Gc => gc(conf, budget).await.map(|()| None),
            Request::Status => status(conf, budget).await.map(|()| None),
            Request::Version => Ok(None),
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
    match runtime {
        Ok(runtime) => runtime.block_on(verb),
        Err(error) => Err(Error::new(INTERNAL, format!("The plugin's event loop: {error}.")).into()),
    }
}

async fn add(target: &Target, conf: &NetConf, budget: Budget) -> Result<Value, Failure> {
    let options = conf.options()?;
    netns::check(&target.netns)?;
    let socket = &conf.daemon_socket;
    let key = key(target, conf);
    if spool::path(&conf.queue_dir, &key).exists() {
        // The same key once more, before the daemon heard of the end of the first (`terway_core::cni::queue`).
        let request = DelPodRequest { attachment: Some(attachment(&key)), netns: String::new() };
        call(socket, budget, request, |mut client, request| async move { client.del_pod(request).await })
            .await
            .map_err(|error| error.failure(socket))?;
        spool::remove(&conf.queue_dir, &key);
    }
    let request = add_request(target, &key, &options);
    let response = call(socket, budget, request, |mut client, request| async move { client.add_pod(request).await })
        .await
        .map_err(|error| error.failure(socket))?;
    let attached = attached(target, response.network.unwrap_or_default())
        .map_err(|reason| Error::new(INTERNAL, format!("The daemon's answer holds {reason}.")))?;
    let result = options.previous.unwrap_or_default().attach(attached, options.dns);
    Ok(result.document(conf.version))
}

fn add_request(target: &Target, key: &AttachmentKey, options: &Options) -> AddPodRequest {
    let runtime = &options.runtime;
    let mapping = |mapping: &terway_core::cni::runtime::PortMapping| PortMapping {
        host_port: mapping.host_port.into(),
        container_port: mapping.container_port.into(),
        protocol: mapping.protocol.as_str().to_owned(),
        host_ip: mapping.host_ip.map(|address| address.to_string()).unwrap_or_default(),
    };
    AddPodRequest {
        attachment: Some(attachment(key)),
        pod: Some(Pod {
            namespace: target.pod.namespace.clone(),
            name: target.pod.name.clone(),
            uid: target.pod.uid.clone(),
        }),
        netns: target.netns.clone(),
        mtu: options.mtu.unwrap_or(0),
        port_mappings: runtime.port_mappings.iter().map(mapping).collect(),
        bandwidth: Some(Bandwidth {
            ingress_rate: runtime.bandwidth.ingress_rate,
            egress_rate: runtime.bandwidth.egress_rate,
        }),
        annotations: runtime.annotations.clone(),
    }
}

/// The daemon's answer as part of a result; the error is the text that cannot be read.
fn attached(target: &Target, network: Network) -> Result<Attached, String> {
    fn read<T: std::str::FromStr>(text: &str) -> Result<Option<T>, String> {
        if text.is_empty() { Ok(None) } else { text.parse().map(Some).map_err(|_not_of_the_form| format!("{text:?}")) }
    }
    let required = |text: &str| read(text)?.ok_or_else(|| "an empty address".to_owned());
    let host = match network.host_ifname.as_str() {
        "" => None,
        name => Some(Interface::new(name, read(&network.host_mac)?, network.mtu, "")),
    };
    let mut ips = Vec::new();
    for address in &network.addresses {
        ips.push(IpConfig { address: required(&address.cidr)?, gateway: read(&address.gateway)?, interface: None });
    }
    // containerd takes a result without addresses for a failed one; here the words are ours.
    if ips.is_empty() {
        return Err("no address".to_owned());
    }
    let mut routes = Vec::new();
    for route in &network.routes {
        routes.push(Route::new(required(&route.dst)?, read(&route.gw)?));
    }
    let pod = Interface::new(&target.ifname, read(&network.pod_mac)?, network.mtu, &target.netns);
    Ok(Attached { host, pod, ips, routes })
}

/// DEL: removes a pod's network, or queues the request on disk for a daemon that is away.
///
/// Fails only where the daemon itself refuses, which the runtime then repeats. Everything else must not: a DEL that fails for
/// ever blocks the deletion of its pod for ever, where one that is lost leaves an address bound until the daemon finds the
/// netns gone.
async fn del(target: &Target, conf: &NetConf, budget: Budget) -> Result<(), Failure> {
    let key = key(target, conf);
    match del_pod(&key, target, conf, budget).await {
        Ok(()) => {
            spool::remove(&conf.queue_dir, &key);
            return Ok(());
        }
        Err(CallError::Refused(failure)) if !is_not_ready(&failure) => return Err(failure),
        Err(_away) => {}
    }
    let queued = spool::write(&conf.queue_dir, &QueuedDel { attachment: key.clone(), netns: target.netns.clone() });
    // The daemon may have come up, and looked through the folder, between the attempt and the file.
    if del_pod(&key, target, conf, budget.without_waiting()).await.is_ok() {
        spool::remove(&conf.queue_dir, &key);
    } else if let Err(error) = queued {
        warn(&format!(
            "terway: DEL of {key} could not be queued in {}: {error}; the daemon releases the address when it finds the pod gone",
            conf.queue_dir
        ));
    }
    Ok(())
}

async fn del_pod(key: &AttachmentKey, target: &Target, conf: &NetConf, budget: Budget) -> Result<(), CallError> {
    let request = DelPodRequest { attachment: Some(attachment(key)), netns: target.netns.clone() };
    call(&conf.daemon_socket, budget, request, |mut client, request| async move { client.del_pod(request).await })
        .await
        .map(|_empty| ())
}

/// A daemon that is still starting reads the queue before it is ready.
fn is_not_ready(failure: &Failure) -> bool {
    failure.details.starts_with(NOT_READY.id)
}

async fn check(target: &Target, conf: &NetConf, budget: Budget) -> Result<(), Failure> {
    let options = conf.options()?;
    netns::check(&target.netns)?;
    // "CHECK": the runtime must hand over the result of the ADD.
    let Some(previous) = options.previous else {
        return Err(Error::new(CNI_CONFIG, "prevResult is absent, and CHECK compares with it.").into());
    };
    let addresses = owned_addresses(&previous, &target.ifname);
    let key = key(target, conf);
    let request = CheckPodRequest { attachment: Some(attachment(&key)), netns: target.netns.clone(), addresses };
    let socket = &conf.daemon_socket;
    call(socket, budget, request, |mut client, request| async move { client.check_pod(request).await })
        .await
        .map(|_empty| ())
        .map_err(|error| error.failure(socket))
}

fn owned_addresses(previous: &CniResult, ifname: &str) -> Vec<String> {
    previous.addresses_of(ifname).map(|address| address.to_string()).collect()
}

async fn gc(conf: &NetConf, budget: Budget) -> Result<(), Failure> {
    let network = &conf.network;
    let valid = conf
        .valid_attachments()?
        .into_iter()
        .map(|entry| Attachment { network: network.clone(), container_id: entry.container_id, ifname: entry.ifname })
        .collect();
    let request = GcPodsRequest { network: network.clone(), valid };
    let socket = &conf.daemon_socket;
    call(socket, budget, request, |mut client, request| async move { client.gc_pods(request).await })
        .await
        .map(|_removed| ())
        .map_err(|error| error.failure(socket))
}

/// "STATUS": silence is readiness. Whatever keeps the daemon from answering is code 50.
async fn status(conf: &NetConf, budget: Budget) -> Result<(), Failure> {
    let socket = &conf.daemon_socket;
    let response =
        call(socket, budget, StatusRequest {}, |mut client, request| async move { client.status(request).await })
            .await
            .map_err(|error| error.failure(socket).with_code(NOT_AVAILABLE))?;
    let limited = response.problems.iter().find(|problem| problem.cni_code == LIMITED);
    match (response.ready, limited) {
        (true, None) => Ok(()),
        (_, Some(problem)) => Err(failure_of(problem).with_code(LIMITED)),
        (false, None) => Err(match response.problems.first() {
            Some(problem) => failure_of(problem).with_code(NOT_AVAILABLE),
            None => Error::new(NOT_READY, "The daemon gives no reason.").into(),
        }),
    }
}

fn failure_of(problem: &ErrorDetail) -> Failure {
    Failure::from_parts(problem.cni_code, &problem.code, &problem.cause, &problem.detail, &problem.remedy)
}

fn key(target: &Target, conf: &NetConf) -> AttachmentKey {
    AttachmentKey {
        network: conf.network.clone(),
        container_id: target.container_id.clone(),
        ifname: target.ifname.clone(),
    }
}

fn attachment(key: &AttachmentKey) -> Attachment {
    Attachment { network: key.network.clone(), container_id: key.container_id.clone(), ifname: key.ifname.clone() }
}

/// A line for the runtime's log; stdout is for documents.
fn warn(line: &str) {
    use std::io::Write as _;
    let _nobody_listens = writeln!(std::io::stderr().lock(), "{line}");
}
