//! Which crate may depend on which: the walls of ARCHITECTURE.md that Cargo.toml alone does not keep from moving.

use anyhow::Result;

use super::Finding;
use crate::process;
use crate::workspace::{Package, Workspace};

/// A crate, what it must not be linked with (a trailing `*` stands for any ending), and why.
struct Wall {
    package: &'static str,
    forbidden: &'static [&'static str],
    why: &'static str,
}

const WALLS: &[Wall] = &[
    Wall {
        package: "terway-core",
        forbidden: &[
            "aya*",
            "axum",
            "hyper*",
            "kube*",
            "libc",
            "mio",
            "netlink-*",
            "nix",
            "redb",
            "reqwest",
            "rtnetlink",
            "rustix",
            "socket2",
            "tokio*",
            "tonic*",
            "tracing*",
            "terway-daemon",
            "terway-ebpf",
            "terway-proto",
        ],
        why: "terway-core decides and does no IO; put the acting part into terway-daemon",
    },
    Wall {
        package: "terway-cni",
        forbidden: &[
            "aya*",
            "axum",
            "kube*",
            "netlink-*",
            "redb",
            "reqwest",
            "rtnetlink",
            "rustls*",
            "terway-abi",
            "terway-daemon",
            "terway-ebpf",
            "tracing-subscriber",
        ],
        why: "the plugin is thin: it asks the daemon, which does the work",
    },
    Wall {
        package: "terway-proto",
        forbidden: &["aya*", "kube*", "redb", "rtnetlink", "terway-abi", "terway-core", "terway-daemon", "terway-ebpf"],
        why: "the contract knows nothing of either side",
    },
];

/// Crates that run on a user's node.
const SHIPPED: [&str; 6] = ["terway-abi", "terway-cni", "terway-core", "terway-daemon", "terway-ebpf", "terway-proto"];
/// What the programs may link besides the ABI.
const KERNEL_SIDE: [&str; 2] = ["aya-ebpf", "aya-log-ebpf"];
/// Crates that never do.
const NOT_SHIPPED: [&str; 5] = ["codegen", "terway-oracle", "terway-sim", "terway-tests", "xtask"];

/// Checks direct dependencies of all packages, and all that the walled ones are linked with.
///
/// # Errors
/// Cargo cannot read a manifest.
pub(super) fn check(workspace: &Workspace, packages: &[Package]) -> Result<Vec<Finding>> {
    let mut found = direct(packages);
    for wall in WALLS.iter().filter(|w| packages.iter().any(|p| p.name == w.package)) {
        let tree = process::output(workspace.cargo("tree").args([
            "--package",
            wall.package,
            "--edges=normal",
            "--prefix=none",
            "--no-dedupe",
            "--format={p}",
        ]))?;
        found.extend(behind(wall, &manifest(packages, wall.package), &tree));
    }
    Ok(found)
}

/// A wall's forbidden crates in the output of `cargo tree`: one `name version` a line.
fn behind(wall: &Wall, manifest: &str, tree: &str) -> Vec<Finding> {
    let mut names: Vec<_> = tree.lines().filter_map(|l| l.split_whitespace().next()).collect();
    names.sort_unstable();
    names.dedup();
    let forbidden = |name: &str| wall.forbidden.iter().any(|f| matches(f, name));
    let advice = |name: &str| {
        let way = format!("`cargo tree -p {} -i {name} -e normal` shows the way in", wall.package);
        format!("must not be linked with {name}: {}; {way}", wall.why)
    };
    names.into_iter().filter(|n| forbidden(n)).map(|n| Finding::new(manifest, 1, "wall", &advice(n))).collect()
}

fn matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        // `aya*` means aya and its family, not a crate that happens to begin so.
        Some(stem) => {
            name.strip_prefix(stem).is_some_and(|r| r.is_empty() || stem.ends_with('-') || r.starts_with('-'))
        }
        None => pattern == name,
    }
}

fn direct(packages: &[Package]) -> Vec<Finding> {
    let mut found = Vec::new();
    for package in packages {
        let path = manifest(packages, &package.name);
        let mut bad = |advice: String| found.push(Finding::new(&path, 1, "wall", &advice));
        for dependency in package.dependencies.iter().filter(|d| d.kind.as_deref() != Some("dev")) {
            let name = dependency.name.as_str();
            let only_for_bpf = dependency.target.as_deref().is_some_and(|t| t.contains("target_arch = \"bpf\""));
            match package.name.as_str() {
                "terway-abi" if name != "aya" || !dependency.optional => {
                    bad(format!("{name}: the ABI needs core alone, and aya behind the feature `user`"));
                }
                "terway-ebpf" if name != "terway-abi" && !(KERNEL_SIDE.contains(&name) && only_for_bpf) => {
                    bad(format!(
                        "{name}: the datapath needs terway-abi, and {} under cfg(target_arch = \"bpf\")",
                        KERNEL_SIDE.join(" and ")
                    ));
                }
                shipped if SHIPPED.contains(&shipped) && NOT_SHIPPED.contains(&name) => {
                    bad(format!("{name} is for tests and chores and is never shipped"));
                }
                _ => {}
            }
        }
    }
    found
}

/// A package's manifest below the workspace.
fn manifest(packages: &[Package], name: &str) -> String {
    let root = packages.iter().filter_map(|p| p.manifest.parent()?.parent()).min_by_key(|p| p.as_os_str().len());
    let package = packages.iter().find(|p| p.name == name);
    let path = package.map(|p| root.and_then(|r| p.manifest.strip_prefix(r).ok()).unwrap_or(&p.manifest));
    path.map_or_else(|| name.to_owned(), |p| p.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace::Dependency;

    fn package(name: &str, dependencies: &[(&str, bool, Option<&str>)]) -> Package {
        let one = |(name, optional, target): &(&str, bool, Option<&str>)| Dependency {
            name: (*name).to_owned(),
            optional: *optional,
            kind: None,
            target: target.map(str::to_owned),
        };
        Package {
            name: name.to_owned(),
            manifest: format!("/w/{name}/Cargo.toml").into(),
            targets: Vec::new(),
            dependencies: dependencies.iter().map(one).collect(),
        }
    }

    #[test]
    fn a_forbidden_crate_anywhere_in_the_tree_is_found() {
        let wall = WALLS.iter().find(|w| w.package == "terway-cni").unwrap();
        let tree = "terway-cni v0.1.0 (/w/terway-cni)\ntokio v1.0.0\naya-obj v0.3.0\nredb v4.0.0\nayatollah v1.0.0\n";
        let found = behind(wall, "terway-cni/Cargo.toml", tree);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].advice.contains("aya-obj") && found[1].advice.contains("redb"));
    }

    #[test]
    fn patterns_match_families() {
        assert!(matches("aya*", "aya") && matches("aya*", "aya-obj") && !matches("aya*", "ayatollah"));
        assert!(matches("netlink-*", "netlink-sys") && !matches("tokio", "tokio-util"));
    }

    #[test]
    fn direct_dependencies_of_the_kernel_side() {
        let bpf = Some("cfg(target_arch = \"bpf\")");
        let good = [
            package("terway-abi", &[("aya", true, None)]),
            package(
                "terway-ebpf",
                &[("terway-abi", false, None), ("aya-ebpf", false, bpf), ("aya-log-ebpf", false, bpf)],
            ),
            package("terway-tests", &[("terway-sim", false, None)]),
        ];
        assert!(direct(&good).is_empty());
        for bad in [
            package("terway-abi", &[("aya", false, None)]),
            package("terway-abi", &[("serde", true, None)]),
            package("terway-ebpf", &[("aya-ebpf", false, None)]),
            package("terway-daemon", &[("terway-sim", false, None)]),
        ] {
            assert_eq!(direct(std::slice::from_ref(&bad)).len(), 1, "{bad:?}");
        }
    }
}
