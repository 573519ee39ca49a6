//! The life of `terwayd`: from the lock to the last answer.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Map;
use terway_core::clock::Moment;
use terway_core::cni;
use terway_core::config::Config;
use terway_core::conntrack::Cost;
use terway_core::errors::{self, Error};
use terway_core::ident::Addresses;
use terway_core::ipam::{NodeFacts, Pool, Record, Snapshot};
use terway_core::route::{NodeInputs, NodePlan};
use terway_core::service;
use tokio::signal::unix::{SignalKind, signal};
use tracing::{info, warn};

use crate::atomic_file;
use crate::bpf::{self, Datapath};
use crate::cloud::{Aliyun, Cloud, EcsConfig, EniFilter, Metadata, Retry, endpoint};
use crate::config_source::{ConfigMetrics, ConfigSource};
use crate::conntrack::{Conntrack, ConntrackMetrics};
use crate::engine::{self, Engine, Facts, Parts};
use crate::http;
use crate::identity::{self, Node};
use crate::memory;
use crate::metrics::{self, Metrics};
use crate::net::Host;
use crate::objects::{Feed, ObjectMetrics, ObjectStore, Subscriber, feed};
use crate::options::Options;
use crate::policy::{self, Policies, PolicyMetrics};
use crate::queue;
use crate::reload::{self, ConfigSubscribers};
use crate::server::Service;
use crate::services::{self, ServiceMetrics, Services};
use crate::socket::{self, InstanceLock};
use crate::store::Store;
use crate::supervise;

/// How long a NIC may stay away once its ENI is attached: hot-plugging takes up to some ten seconds.
const NIC_WITHIN: Duration = Duration::from_secs(20);

/// How long the start waits for the cloud's list of ENIs before it goes on with what the store says.
const INVENTORY_WITHIN: Duration = Duration::from_secs(10);

/// The ports that the kernel gives to clients of the host.
const LOCAL_PORTS: &str = "net/ipv4/ip_local_port_range";

/// How often the plugin's queue is looked at, for DELs that were answered too late.
const QUEUE_EVERY: Duration = Duration::from_secs(5);

/// How long calls under way may take after SIGTERM.
const STOP_WITHIN: Duration = Duration::from_secs(5);

/// The name of the network in the conflist; part of every key, so it never changes.
pub const NETWORK: &str = "terway";

/// Runs the daemon until a signal or a failure ends it.
///
/// # Errors
/// Why it could not start or go on. The datapath stays as it is in every case.
pub async fn run(options: Options) -> Result<(), Error> {
    let start = Instant::now();
    memory::map_large_tables();
    let _lock = InstanceLock::take(&options.state_dir).map_err(|error| match error.kind() {
        std::io::ErrorKind::WouldBlock => {
            Error::new(errors::STORE_FAILED, format!("another terwayd holds {}", options.state_dir.display()))
        }
        _ => failed(errors::STORE_FAILED, &options.state_dir.display().to_string(), &error),
    })?;
    let (mut registry, metrics) = metrics::new_registry();
    let source = Arc::new(ConfigSource::open(options.config_paths(), ConfigMetrics::new(&mut registry))?);
    let config = source.config();
    let store = Store::open(options.store_path())
        .map_err(|error| failed(errors::STORE_FAILED, &options.store_path().display().to_string(), &error))?;
    let records = store.load().map_err(|error| failed(errors::STORE_FAILED, "load", &error))?;

    let host = Arc::new(Host::new()?);
    let links = host.monitor()?;
    let datapath = Arc::new(open_datapath(&options, &config)?);
    metrics::register_datapath(&mut registry, &datapath);

    let (node, aliyun) = identify_node(&options, &config, &metrics).await?;
    let facts = prepare_node(&options, &config, &node, &host).await?;
    let addresses = links.addresses();
    reload::host_stack(&config, &addresses.borrow().clone(), &datapath)?;
    reload::flow_events(&config, &datapath)?;

    let snapshot = Snapshot {
        records: records.clone(),
        enis: inventory(&*aliyun, &node).await,
        facts: gone(&host, &records).await?,
    };
    let (pool, effects) = Pool::restore(reload::pool(&options, &config, &node), snapshot, Moment::ZERO)
        .map_err(|error| failed(errors::STORE_FAILED, "restore", &error))?;
    let objects = Arc::new(ObjectStore::default());
    let policies = Policies::start(policy::Setup {
        datapath: Arc::clone(&datapath),
        objects: Arc::clone(&objects),
        addresses: links.addresses(),
        config: source.subscribe(),
        metrics: PolicyMetrics::new(&mut registry),
    })?;
    let services = services::Setup {
        objects: Arc::clone(&objects),
        has_source: options.objects.is_some(),
        facts: service::NodeFacts { name: facts.node.as_str().into(), zone: Some(facts.identity.zone.as_str().into()) },
        settings: service::Settings { in_cluster_loadbalance: config.in_cluster_loadbalance, ..Default::default() },
        datapath: Arc::clone(&datapath),
        addresses: links.addresses(),
        metrics: ServiceMetrics::new(&mut registry),
        cgroup: options.cgroup.clone(),
        end_sockets: options.end_sockets,
        host: Arc::clone(&host),
    };
    let parts = Parts {
        pool,
        origin: Instant::now(),
        store,
        cloud: Arc::clone(&aliyun) as Arc<dyn Cloud>,
        datapath: Arc::clone(&datapath),
        policies: Arc::clone(&policies),
        host,
        links,
        facts,
        defaults: reload::pod_defaults(&options, &config),
        metrics: metrics.clone(),
    };
    let engine = Engine::new(parts);
    engine.begin(&records, effects).await?;
    forget_older_maps(&datapath).await;
    let pods = Arc::clone(&engine);
    let services = Services::start(services, move || pods.pod_namespaces());
    let feed = Feed::start(feed::Setup {
        open: feed::open(options.objects.clone()),
        store: objects,
        // The order of delivery: see the feed's contract.
        subscribers: vec![Arc::clone(&policies) as Arc<dyn Subscriber>, Arc::clone(&services) as Arc<dyn Subscriber>],
        metrics: ObjectMetrics::new(&mut registry),
    });
    supervise::spawn("uplink", Arc::clone(&engine).serve_external_clients());
    let conntrack = Conntrack::start(
        Arc::clone(&datapath),
        source.subscribe(),
        ConntrackMetrics::new(&mut registry),
        options.time_scale,
    );
    supervise::spawn("engine-timer", Arc::clone(&engine).tick());
    supervise::spawn_restarting("flow-log", {
        let (engine, services) = (Arc::clone(&engine), Arc::clone(&services));
        move || Arc::clone(&engine).run_flow_log(Arc::clone(&services))
    });
    let subscribers =
        ConfigSubscribers { options: options.clone(), node, cloud: aliyun, engine: Arc::clone(&engine), datapath };
    supervise::spawn("config-subscribers", subscribers.run(source.subscribe(), addresses));
    supervise::spawn_restarting("config-source", {
        let source = Arc::clone(&source);
        move || Arc::clone(&source).run()
    });

    // Listening comes before reading the queue: see terway_core::cni::queue for why nothing falls in between.
    let listener = socket::bind(&options.socket)
        .map_err(|error| failed(errors::INTERNAL, &options.socket.display().to_string(), &error))?;
    work_off_queue(&engine, &options.spool_dir(), &metrics).await;
    supervise::spawn(
        "audit",
        repeat(Duration::from_secs(options.audit_interval.max(1)), {
            let engine = Arc::clone(&engine);
            move || {
                let engine = Arc::clone(&engine);
                async move { engine.audit().await }
            }
        }),
    );
    supervise::spawn("audit-on-deletion", Arc::clone(&engine).repair_deletions());
    supervise::spawn(
        "del-queue",
        repeat(QUEUE_EVERY, {
            let (engine, dir, metrics) = (Arc::clone(&engine), options.spool_dir(), metrics.clone());
            move || {
                let (engine, dir, metrics) = (Arc::clone(&engine), dir.clone(), metrics.clone());
                async move { work_off_queue(&engine, &dir, &metrics).await }
            }
        }),
    );
    let ready: http::Ready = {
        let engine = Arc::clone(&engine);
        Arc::new(move || {
            engine.refresh_gauges();
            engine.ready().map_err(|error| error.to_string())
        })
    };
    let http = http::Server::new(options.listen, Arc::new(registry), ready);
    supervise::spawn_restarting("http", {
        let http = Arc::clone(&http);
        move || Arc::clone(&http).run()
    });

    // Before it serves: who asks it to stop as soon as it does gets an orderly stop.
    let signalled = signalled();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let service = Service {
        engine: Arc::clone(&engine),
        source: Arc::clone(&source),
        objects: feed,
        services,
        conntrack,
        policies,
        http,
        metrics: metrics.clone(),
    };
    let mut server = supervise::spawn(
        "grpc-server",
        tonic::transport::Server::builder().add_service(service.into_server()).serve_with_incoming_shutdown(
            socket::trusted(listener),
            async {
                let _ = stopped.await;
            },
        ),
    );
    write_conflist(&options)?;
    metrics.started(start.elapsed());
    info!(took = ?start.elapsed(), node = options.node_name(), "serving");

    let outcome = tokio::select! {
        () = signalled => Ok(()),
        reason = engine.failed() => Err(reason),
        ended = &mut server => {
            let detail = format!("the gRPC server ended: {ended:?}");
            return Err(Error::new(errors::INTERNAL, detail));
        }
    };
    // Pods keep their network: programs stay attached, maps and links stay pinned, the conflist stays in place.
    engine.close_flow_streams();
    let _ = stop.send(());
    if tokio::time::timeout(STOP_WITHIN, server).await.is_err() {
        warn!("some calls did not finish in time; the next start takes them up");
    }
    info!("stopped; the datapath goes on");
    outcome
}

fn failed(code: errors::Code, what: &str, error: &dyn std::error::Error) -> Error {
    Error::new(code, format!("{what}: {error}"))
}

/// Every pod and ENI has this daemon's programs now. What is left of older ones is only memory: no reason not to start.
async fn forget_older_maps(datapath: &Arc<Datapath>) {
    let datapath = Arc::clone(datapath);
    if let Err(error) = supervise::blocking(move || datapath.remove_other_versions()).await {
        warn!(%error, "failed to remove the maps of another version or size");
    }
}

async fn repeat<F: Future<Output = ()>>(every: Duration, mut work: impl FnMut() -> F) {
    loop {
        tokio::time::sleep(every).await;
        work().await;
    }
}

fn open_datapath(options: &Options, config: &Config) -> Result<Datapath, Error> {
    let [flows_v4, flows_v6] = match options.flow_entries {
        Some(entries) => [entries; 2],
        None => {
            let memory = memory().map_err(|error| failed(errors::INTERNAL, "the node's memory", &error))?;
            let [v4, v6] = bpf::FLOW_BYTES;
            let cost = Cost { v4: config.ip_stack.v4().then_some(v4), v6: config.ip_stack.v6().then_some(v6) };
            config.conntrack.sizing.entries(memory, cost)
        }
    };
    info!(flows_v4, flows_v6, "flow tables");
    let config = bpf::Config { flows_v4, flows_v6, ..bpf::Config::new(&options.bpffs) };
    Datapath::open(&config).map_err(|error| failed(errors::BPF_FAILED, &options.bpffs.display().to_string(), &error))
}

/// The node's memory in bytes.
fn memory() -> std::io::Result<u64> {
    let info = nix::sys::sysinfo::sysinfo()?;
    Ok(info.ram_total())
}

/// Learns who this node is and makes the client of its cloud.
async fn identify_node(options: &Options, config: &Config, metrics: &Metrics) -> Result<(Node, Arc<Aliyun>), Error> {
    let bad = |error: &dyn std::error::Error| failed(errors::CONFIG_INVALID, "endpoint", error);
    let observer: crate::cloud::CallObserver = {
        let metrics = metrics.clone();
        Arc::new(move |call| metrics.cloud_call(call.api, &call.error_label(), call.duration))
    };
    let metadata_url = endpoint(&options.metadata).map_err(|e| bad(&e))?;
    let kept = identity::kept(&options.node_path());
    let identity = if let Some(kept) = &kept {
        kept.identity.clone()
    } else {
        let metadata =
            Metadata::new(metadata_url.clone(), Duration::from_secs(5), Retry::default(), Some(Arc::clone(&observer)))
                .map_err(|e| failed(errors::CLOUD_FAILED, "metadata", &e))?;
        identity::retry_forever("metadata service: who is this node", || metadata.node_identity()).await
    };

    let region = config.region.as_deref().unwrap_or(&identity.region);
    let mut ecs = EcsConfig::for_region(region, options.endpoint_network(), reload::credentials(options, config))
        .map_err(|e| bad(&e))?;
    // An endpoint that is given has its scheme in it.
    ecs = ecs.with_scheme(options.endpoint_scheme());
    ecs.signature = options.signature();
    ecs.rate_limits.clone_from(&config.rate_limits);
    ecs.metadata = metadata_url;
    ecs.observer = Some(observer);
    for (url, given) in [(&mut ecs.ecs_endpoint, &options.ecs_endpoint), (&mut ecs.vpc_endpoint, &options.vpc_endpoint)]
    {
        if let Some(given) = given {
            *url = endpoint(given).map_err(|e| bad(&e))?;
        }
    }
    let cloud = Aliyun::new(&ecs).map_err(|e| failed(errors::CLOUD_FAILED, "client", &e))?;

    let node = match kept {
        Some(node) => node,
        None => {
            let limits = identity::retry_forever("ECS: what the instance type carries", || {
                cloud.instance_limits(&identity.instance_type)
            })
            .await;
            let token_seed =
                identity::token_seed(&identity).map_err(|e| failed(errors::INTERNAL, "/dev/urandom", &e))?;
            let node = Node { identity, limits, token_seed };
            identity::keep(&options.node_path(), &node)
                .map_err(|e| failed(errors::STORE_FAILED, &options.node_path().display().to_string(), &e))?;
            node
        }
    };
    info!(instance = %node.identity.instance, kind = node.identity.instance_type, zone = node.identity.zone, "this node");
    Ok((node, Arc::new(cloud)))
}

/// Makes the node forward, and collects what plans depend on.
async fn prepare_node(options: &Options, config: &Config, node: &Node, host: &Host) -> Result<Facts, Error> {
    let inputs = NodeInputs { v4: config.ip_stack.v4(), v6: config.ip_stack.v6(), ra_links: host.ra_links().await? };
    host.ensure_node(&NodePlan::forwarding(&inputs)).await?;
    let state = host.observe(BTreeSet::from([LOCAL_PORTS.to_owned()])).await?;
    let primary =
        state.links.iter().find(|(_, link)| link.mac == Some(node.identity.primary_mac) && link.kind.is_none());
    let primary = primary.or_else(|| state.links.iter().find(|(_, link)| link.mac == Some(node.identity.primary_mac)));
    let mut addresses = Addresses::default();
    let mut nic_mtu = 1500;
    match primary {
        Some((name, link)) => {
            nic_mtu = link.mtu;
            for (_, net) in state.addresses.iter().filter(|(dev, _)| dev == name) {
                match net.ip() {
                    std::net::IpAddr::V4(v4) if config.ip_stack.v4() => addresses.v4 = addresses.v4.or(Some(v4)),
                    std::net::IpAddr::V6(v6) if config.ip_stack.v6() && !v6.is_unicast_link_local() => {
                        addresses.v6 = addresses.v6.or(Some(v6));
                    }
                    _ => {}
                }
            }
        }
        None => warn!(mac = %node.identity.primary_mac, "no interface has the primary ENI's MAC address"),
    }
    Ok(Facts {
        node: options.node_name(),
        identity: node.identity.clone(),
        stack: config.ip_stack,
        addresses,
        nic_mtu,
        subnets: options.subnets_path(),
        services: options.objects.is_some(),
        own_ports: own_ports(state.sysctls.get(LOCAL_PORTS).map(String::as_str)),
        nic_within: NIC_WITHIN / options.time_scale,
    })
}

/// The ports for connections that are sent on, given those that the host's clients get (`LOCAL_PORTS`).
fn own_ports(local: Option<&str>) -> RangeInclusive<u16> {
    let mut numbers = local.into_iter().flat_map(str::split_whitespace).map_while(|text| text.parse().ok());
    // Without IPv4 there is no such sysctl, and the kernel's default holds (net/ipv4/af_inet.c, inet_init_net).
    let local = numbers.next().unwrap_or(32_768)..=numbers.next().unwrap_or(60_999);
    let (ports, ours) = service::snat_port_range(&local);
    if !ours {
        warn!(
            ?local,
            ?ports,
            "{LOCAL_PORTS} leaves no ports over: connections that are sent on to other nodes share these with the host's"
        );
    }
    ports
}

async fn inventory(cloud: &dyn Cloud, node: &Node) -> Option<Vec<terway_core::cloud::Eni>> {
    let filter = EniFilter::of_instance(&node.identity.instance);
    match tokio::time::timeout(INVENTORY_WITHIN, cloud.enis(&filter)).await {
        Ok(Ok(enis)) => Some(enis),
        Ok(Err(error)) => {
            warn!(%error, "the cloud does not list the ENIs; going on with what the store says");
            None
        }
        Err(_) => {
            warn!("the cloud does not answer; going on with what the store says");
            None
        }
    }
}

async fn gone(host: &Host, records: &[Record]) -> Result<NodeFacts, Error> {
    let attachments = records.iter().filter_map(|record| match record {
        Record::Attachment(a) => Some((a.key.clone(), a.netns.clone())),
        _ => None,
    });
    Ok(NodeFacts { netns_gone: engine::gone(host, attachments.collect()).await? })
}

async fn work_off_queue(engine: &Arc<Engine>, dir: &Path, metrics: &Metrics) {
    let queued = match queue::read(dir) {
        Ok(queued) => queued,
        Err(error) => {
            warn!(dir = %dir.display(), %error, "the queue of DELs cannot be read");
            return;
        }
    };
    for (path, del) in queued {
        match engine.del(del.attachment.clone()).await {
            Ok(()) => {
                info!(key = %del.attachment, "carried out a queued DEL");
                metrics.spooled_del();
                let _ = std::fs::remove_file(path);
            }
            Err(error) => warn!(key = %del.attachment, %error, "a queued DEL failed; it stays queued"),
        }
    }
}

/// Tells the runtime that the node can take pods. Written last, by rename, and left in place when the daemon ends.
fn write_conflist(options: &Options) -> Result<(), Error> {
    let text = |path: &Path| path.display().to_string();
    let list = cni::conflist::conflist(NETWORK, &text(&options.socket), &text(&options.spool_dir()), &Map::new());
    let path = options.cni_conf_dir.join(cni::conflist::FILE_NAME);
    std::fs::create_dir_all(&options.cni_conf_dir)
        .and_then(|()| atomic_file::write_if_changed(&path, list.as_bytes()))
        .map(|written| info!(path = %path.display(), written, "conflist"))
        .map_err(|error| failed(errors::STORE_FAILED, &path.display().to_string(), &error))
}

/// Catches signals from now on; ends with the first one.
fn signalled() -> impl Future<Output = ()> {
    let both = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    async move {
        let (Ok(mut term), Ok(mut int)) = both else {
            return std::future::pending().await;
        };
        tokio::select! {
            _ = term.recv() => info!("SIGTERM"),
            _ = int.recv() => info!("SIGINT"),
        }
    }
}
