//! A real API server of Kubernetes: etcd and kube-apiserver in a network namespace, with certificates, users and kubeconfigs of their own.
//!
//! There is no controller manager and no scheduler: a test writes what they would (EndpointSlices, `spec.nodeName`, the status of pods).

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};
use serde_json::json;

use crate::netns::NetNs;

/// The port of the API server.
pub const PORT: u16 = 6443;
/// The time in which a server starts, on a machine that does other work, too.
const START_WITHIN: Duration = Duration::from_secs(120);

/// The programs.
#[derive(Clone, Debug)]
pub struct Programs {
    /// kube-apiserver.
    pub apiserver: PathBuf,
    /// etcd.
    pub etcd: PathBuf,
    /// kubectl.
    pub kubectl: PathBuf,
}

impl Programs {
    /// Finds the programs: in `KUBEBUILDER_ASSETS`, or in the cache that `cargo xtask setup` fills.
    #[must_use]
    pub fn find() -> Option<Self> {
        let cache = std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache/terway/kube"));
        let folders = std::env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from).into_iter().chain(cache);
        let kubectl = ["/usr/bin/kubectl", "/usr/local/bin/kubectl"].map(PathBuf::from);
        folders.into_iter().find_map(|folder| {
            let [apiserver, etcd] = ["kube-apiserver", "etcd"].map(|name| folder.join(name));
            let kubectl = std::iter::once(folder.join("kubectl")).chain(kubectl.clone()).find(|path| path.is_file())?;
            (apiserver.is_file() && etcd.is_file()).then_some(Self { apiserver, etcd, kubectl })
        })
    }
}

/// A user of the API, by client certificate.
#[derive(Clone, Copy, Debug)]
pub struct User<'a> {
    /// The name.
    pub name: &'a str,
    /// The group, if any. rcgen writes one organization into a certificate.
    pub group: Option<&'a str>,
}

/// The user whom nothing is forbidden.
pub const ADMIN: User<'_> = User { name: "admin", group: Some("system:masters") };

/// The service account of the daemon.
pub const DAEMON: User<'_> =
    User { name: "system:serviceaccount:kube-system:terway", group: Some("system:serviceaccounts:kube-system") };

/// An API server with its etcd. Both end with this value.
#[derive(Debug)]
pub struct ApiServer {
    netns: Arc<NetNs>,
    programs: Programs,
    address: IpAddr,
    folder: PathBuf,
    authority: Authority,
    etcd: Option<Child>,
    server: Option<Child>,
}

/// The certificate authority.
struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Authority")
    }
}

impl Authority {
    fn new() -> Result<Self> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name.push(DnType::CommonName, "terway-sim");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate()?;
        let pem = params.self_signed(&key)?.pem();
        Ok(Self { pem, issuer: Issuer::new(params, key) })
    }

    /// A certificate and its key, in PEM.
    fn sign(&self, user: User<'_>, addresses: &[SanType], usage: ExtendedKeyUsagePurpose) -> Result<(String, String)> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name.push(DnType::CommonName, user.name);
        if let Some(group) = user.group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params.subject_alt_names = addresses.to_vec();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok((certificate.pem(), key.serialize_pem()))
    }
}

impl ApiServer {
    /// Starts etcd and an API server at an address of the namespace, with state in `folder`.
    ///
    /// # Errors
    /// When one of them does not become ready; the end of its log is told.
    pub fn start(netns: Arc<NetNs>, address: IpAddr, programs: Programs, folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder)?;
        fs::set_permissions(folder, fs::Permissions::from_mode(0o700))?;
        let mut this = Self {
            netns,
            programs,
            address,
            folder: folder.to_owned(),
            authority: Authority::new()?,
            etcd: None,
            server: None,
        };
        this.write_credentials()?;
        this.start_etcd()?;
        this.start_server()?;
        Ok(this)
    }

    /// The address of the server.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        SocketAddr::new(self.address, PORT)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn write_credentials(&self) -> Result<()> {
        let names = [
            "localhost",
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
        ];
        let mut sans =
            names.into_iter().map(|name| Ok(SanType::DnsName(name.try_into()?))).collect::<Result<Vec<_>>>()?;
        sans.extend(
            [Ipv4Addr::LOCALHOST.into(), Ipv4Addr::new(10, 96, 0, 1).into(), self.address].map(SanType::IpAddress),
        );
        let (certificate, key) = self.authority.sign(
            User { name: "kube-apiserver", group: None },
            &sans,
            ExtendedKeyUsagePurpose::ServerAuth,
        )?;
        fs::write(self.path("ca.crt"), &self.authority.pem)?;
        fs::write(self.path("apiserver.crt"), certificate)?;
        fs::write(self.path("apiserver.key"), key)?;
        // Signs and verifies the tokens of service accounts.
        let key = KeyPair::generate()?;
        fs::write(self.path("sa.key"), key.serialize_pem())?;
        fs::write(self.path("sa.pub"), key.public_key_pem())?;
        Ok(())
    }

    fn log(&self, name: &str) -> Result<Stdio> {
        Ok(fs::File::options().create(true).append(true).open(self.path(name))?.into())
    }

    fn start_etcd(&mut self) -> Result<()> {
        let mut command = self.netns.command(&self.programs.etcd);
        command.args(["--name=sim", "--unsafe-no-fsync", "--listen-client-urls=http://127.0.0.1:2379"]);
        command.args(["--advertise-client-urls=http://127.0.0.1:2379", "--listen-peer-urls=http://127.0.0.1:2380"]);
        command.args([
            "--initial-advertise-peer-urls=http://127.0.0.1:2380",
            "--initial-cluster=sim=http://127.0.0.1:2380",
        ]);
        command.arg("--data-dir").arg(self.path("etcd"));
        command.stdin(Stdio::null()).stdout(self.log("etcd.log")?).stderr(self.log("etcd.log")?);
        self.etcd = Some(command.spawn().context("start etcd")?);
        Ok(())
    }

    fn start_server(&mut self) -> Result<()> {
        let mut command = self.netns.command(&self.programs.apiserver);
        let file = |flag: &str, name: &str| format!("--{flag}={}", self.path(name).display());
        command.args([
            "--etcd-servers=http://127.0.0.1:2379".to_owned(),
            format!("--bind-address={}", self.address),
            format!("--advertise-address={}", self.address),
            format!("--secure-port={PORT}"),
            "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--allow-privileged=true".to_owned(),
            "--disable-admission-plugins=ServiceAccount".to_owned(),
            "--endpoint-reconciler-type=none".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            file("client-ca-file", "ca.crt"),
            file("tls-cert-file", "apiserver.crt"),
            file("tls-private-key-file", "apiserver.key"),
            file("service-account-key-file", "sa.pub"),
            file("service-account-signing-key-file", "sa.key"),
            file("cert-dir", "certs"),
        ]);
        command.stdin(Stdio::null()).stdout(self.log("apiserver.log")?).stderr(self.log("apiserver.log")?);
        self.server = Some(command.spawn().context("start kube-apiserver")?);
        self.wait_until_ready()
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + START_WITHIN;
        let kubeconfig = self.kubeconfig(ADMIN)?;
        loop {
            let mut command = self.netns.command(&self.programs.kubectl);
            command.arg("--kubeconfig").arg(&kubeconfig).args(["get", "--raw", "/readyz"]);
            let output = command.stdin(Stdio::null()).output().context("kubectl")?;
            if output.status.success() && output.stdout == b"ok" {
                return Ok(());
            }
            for (name, log, child) in
                [("etcd", "etcd", &mut self.etcd), ("kube-apiserver", "apiserver", &mut self.server)]
            {
                if let Some(status) = child.as_mut().map(Child::try_wait).transpose()?.flatten() {
                    bail!("{name} ended with {status}: {}", last_words(&self.folder.join(format!("{log}.log"))));
                }
            }
            if Instant::now() > deadline {
                bail!(
                    "kube-apiserver is not ready; see {}: {}",
                    self.folder.display(),
                    String::from_utf8_lossy(&output.stderr)
                );
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Kills the API server; etcd stays.
    ///
    /// # Errors
    /// When there is none.
    pub fn kill(&mut self) -> Result<()> {
        let mut server = self.server.take().context("no API server runs")?;
        server.kill()?;
        server.wait()?;
        Ok(())
    }

    /// Starts the API server again.
    ///
    /// # Errors
    /// As [`ApiServer::start`].
    pub fn restart(&mut self) -> Result<()> {
        self.start_server()
    }

    /// Kills both, forgets everything that etcd holds, and starts them again: resource versions begin anew.
    ///
    /// # Errors
    /// As [`ApiServer::start`].
    pub fn reset(&mut self) -> Result<()> {
        self.kill()?;
        if let Some(mut etcd) = self.etcd.take() {
            etcd.kill()?;
            etcd.wait()?;
        }
        fs::remove_dir_all(self.path("etcd"))?;
        self.start_etcd()?;
        self.start_server()
    }

    /// Sends the API server a signal: SIGSTOP makes a server that accepts connections and never answers, SIGCONT ends that.
    ///
    /// # Errors
    /// When there is none.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let server = self.server.as_ref().context("no API server runs")?;
        Ok(kill(Pid::from_raw(server.id().try_into()?), signal)?)
    }

    /// Writes a kubeconfig for a user, with a certificate that is made for it.
    ///
    /// # Errors
    /// When the certificate cannot be made or the file not be written.
    pub fn kubeconfig(&self, user: User<'_>) -> Result<PathBuf> {
        let (certificate, key) = self.authority.sign(user, &[], ExtendedKeyUsagePurpose::ClientAuth)?;
        let [ca, certificate, key] = [&self.authority.pem, &certificate, &key].map(|pem| BASE64.encode(pem));
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "sim",
            "clusters": [{ "name": "sim", "cluster": { "server": format!("https://{}", self.address()), "certificate-authority-data": ca } }],
            "users": [{ "name": "user", "user": { "client-certificate-data": certificate, "client-key-data": key } }],
            "contexts": [{ "name": "sim", "context": { "cluster": "sim", "user": "user" } }],
        });
        let path = self.path(&format!("{}.kubeconfig", user.name.replace(':', "-")));
        fs::write(&path, config.to_string())?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        Ok(path)
    }

    /// Runs kubectl as [`ADMIN`] with `input` on its standard input, and returns its output.
    ///
    /// # Errors
    /// When it fails; its words are told.
    pub fn kubectl(&self, arguments: &[&str], input: &str) -> Result<String> {
        let kubeconfig = self.path("admin.kubeconfig");
        let mut command = self.netns.command(&self.programs.kubectl);
        command.arg("--kubeconfig").arg(kubeconfig).args(arguments);
        crate::netns::feed(&mut command, input).with_context(|| format!("kubectl {}", arguments.join(" ")))
    }

    /// Creates objects, each by one request; cheaper than [`ApiServer::apply`] for many.
    ///
    /// # Errors
    /// When the API server refuses one.
    pub fn create(&self, objects: &[serde_json::Value]) -> Result<()> {
        let list = json!({ "apiVersion": "v1", "kind": "List", "items": objects });
        self.kubectl(&["create", "--validate=false", "-f", "-"], &list.to_string()).map(drop)
    }

    /// Creates or updates objects.
    ///
    /// # Errors
    /// When the API server refuses one.
    pub fn apply(&self, objects: &[serde_json::Value]) -> Result<()> {
        let list = json!({ "apiVersion": "v1", "kind": "List", "items": objects });
        self.kubectl(&["apply", "--validate=false", "-f", "-"], &list.to_string()).map(drop)
    }
}

/// The end of a log.
fn last_words(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(5)..].join("\n")
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        for mut child in [self.server.take(), self.etcd.take()].into_iter().flatten() {
            // It may have ended by itself.
            let _ended = child.kill();
            let _status = child.wait();
        }
    }
}
