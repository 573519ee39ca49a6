//! containerd's own configuration, in the two versions that differ.

use super::Options;
use crate::image;

/// The configuration for containerd `version`.
pub(super) fn render(options: &Options, version: &str) -> String {
    if version.starts_with('1') { config_1(options) } else { config_2(options) }
}

/// Configuration version 2, of containerd 1.x.
fn config_1(options: &Options) -> String {
    let Options { work, cni_bin_dir, cni_conf_dir, .. } = options;
    let (work, bin, conf) = (work.display(), cni_bin_dir.display(), cni_conf_dir.display());
    format!(
        r#"version = 2
root = "{work}/root"
state = "{work}/state"
[grpc]
  address = "{work}/c.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "{work}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{image}"
  disable_tcp_service = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  disable_apparmor = true
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        BinaryName = "/usr/sbin/runc"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{bin}"
    conf_dir = "{conf}"
    max_conf_num = 1
"#,
        image = image::NAME
    )
}

/// Configuration version 3, of containerd 2.x.
fn config_2(options: &Options) -> String {
    let Options { work, cni_bin_dir, cni_conf_dir, .. } = options;
    let (work, bin, conf) = (work.display(), cni_bin_dir.display(), cni_conf_dir.display());
    format!(
        r#"version = 3
root = "{work}/root"
state = "{work}/state"
[grpc]
  address = "{work}/c.sock"
[plugins.'io.containerd.internal.v1.opt']
  path = "{work}/opt"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "{image}"
[plugins.'io.containerd.cri.v1.runtime']
  disable_apparmor = true
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins.'io.containerd.cri.v1.runtime'.containerd]
    default_runtime_name = "runc"
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      sandboxer = "podsandbox"
      [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
        BinaryName = "/usr/sbin/runc"
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ["{bin}"]
    conf_dir = "{conf}"
    max_conf_num = 1
[plugins.'io.containerd.grpc.v1.cri']
  disable_tcp_service = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
[plugins.'io.containerd.nri.v1.nri']
  disable = true
"#,
        image = image::NAME
    )
}
