//! A containerd of the machine with Debian's `ptp` plugin: proves the harness apart from our own plugin.

use super::*;
use crate::cri::PodSpec;
use crate::image;

/// Two pods on `ptp` reach each other, and nothing is left afterwards.
fn two_pods(bin_dir: &Path, tag: &str) {
    let name = format!("fabric-{tag}{}", std::process::id());
    let work = tempfile::Builder::new().prefix("twc").tempdir_in("/tmp").unwrap();
    let ns = NetNs::create(&name).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let conf = work.path().join("net.d");
    fs::create_dir_all(&conf).unwrap();
    let ipam = serde_json::json!({
        "type": "host-local", "dataDir": work.path().join("ipam"), "ranges": [[{"subnet": "10.7.8.0/24"}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    });
    let list = serde_json::json!({"cniVersion": "1.0.0", "name": name, "plugins": [{"type": "ptp", "ipam": ipam}]});
    fs::write(conf.join("10.conflist"), list.to_string()).unwrap();
    let image = work.path().join("image.tar");
    image::write(&image, &[]).unwrap();
    let options = Options {
        work: work.path().join("c"),
        bin_dir: bin_dir.to_owned(),
        cni_bin_dir: "/usr/lib/cni".into(),
        cni_conf_dir: conf,
        cgroup_parent: format!("/{name}"),
    };
    let start = Instant::now();
    let containerd = Containerd::start(options, &ns, runtime.handle(), &image).unwrap();
    println!("containerd {} up in {:?}", containerd.version(), start.elapsed());
    let cri = containerd.cri();
    let deadline = Instant::now() + Duration::from_secs(5);
    while !cri.readiness().unwrap().network {
        assert!(Instant::now() < deadline, "{:?}", cri.readiness());
        std::thread::sleep(Duration::from_millis(10));
    }
    let (a, b) = (PodSpec::new("ns-1", "a"), PodSpec::new("ns-2", "b"));
    let pod_a = cri.run_pod(&a).unwrap();
    let pod_b = cri.run_pod(&b).unwrap();
    let status = cri.pod_status(&pod_b).unwrap();
    assert!(status.ready && status.netns.as_ref().is_some_and(|path| path.starts_with(work.path())), "{status:?}");
    let container = cri.start_container(&pod_a, &a, "main", &["/pause"]).unwrap();
    let ping = cri.exec(&container, &["ping", "-c", "1", "-W", "1", &status.ips[0].to_string()]).unwrap();
    assert_eq!(ping.code, 0, "{}", ping.output);
    cri.stop_pod(&pod_b).unwrap();
    cri.remove_pod(&pod_b).unwrap();
    assert_eq!(cri.list_pods().unwrap(), std::slice::from_ref(&pod_a));
    // The other pod stays: stopping has to clear it away.
    containerd.stop().unwrap();
    assert!(cgroups(&format!("/{name}")).is_empty());
    assert!(!fs::read_to_string("/proc/self/mounts").unwrap().contains(&*work.path().to_string_lossy()));
    let cached = fs::read_dir(CNI_CACHE).into_iter().flatten().flatten();
    assert!(!cached.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with(&name)));
    assert_eq!(ns.pids().unwrap(), Vec::<i32>::new());
    println!("all in {:?}", start.elapsed());
}

#[test]
fn debian_containerd_runs_pods_and_leaves_nothing() {
    if !nix::unistd::geteuid().is_root() || !Path::new("/usr/bin/containerd").exists() {
        println!("SKIP: needs root and Debian's containerd");
        return;
    }
    two_pods(Path::new("/usr/bin"), "c1");
}

#[test]
fn containerd_2_runs_pods_and_leaves_nothing() {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIP: needs root");
        return;
    }
    match fetch_containerd_2(&cache_dir()) {
        Ok(bin_dir) => two_pods(&bin_dir, "c2"),
        Err(reason) => println!("SKIP: containerd 2 cannot be had here: {reason:#}"),
    }
}
