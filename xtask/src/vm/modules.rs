//! Kernel modules for the guest: choosing, unpacking, and the index files that modprobe reads (modules.dep(5)).
//!
//! The guest's kernel calls modprobe by itself for a link type, a qdisc or an nft expression, so the index has to be right.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::{Context, Result, bail};
use object::read::elf::ElfFile64;
use object::{Endianness, Object, ObjectSection};

use crate::process;
use crate::setup::Unpacked;

/// Whole folders below `kernel/`: what a node's networking may load by itself.
const FOLDERS: &[&str] = &[
    "drivers/net/bonding",
    "drivers/net/ipvlan",
    "drivers/net/vxlan",
    "drivers/virtio",
    "fs/overlayfs",
    "net/8021q",
    "net/bridge",
    "net/core",
    "net/ipv4",
    "net/ipv6",
    "net/llc",
    "net/netfilter",
    "net/netlink",
    "net/packet",
    "net/sched",
    "net/sctp",
    "net/unix",
];

/// Single modules: virtual links, and what the guest's own plumbing needs.
const SINGLE: &[&str] = &[
    "crc32c_generic",
    "crc32c_intel",
    "dummy",
    "geneve",
    "ifb",
    "macvlan",
    "netkit",
    "nlmon",
    "tap",
    "tun",
    "veth",
    "virtio_console",
    "virtio_net",
    "vrf",
];

/// A module as the guest gets it.
pub(super) struct Module {
    /// Below `lib/modules/VERSION`, without the suffix of a compression.
    pub(super) path: String,
    /// The ELF object.
    pub(super) object: Vec<u8>,
    info: Vec<(String, String)>,
}

impl Module {
    fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.info.iter().filter(move |(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    fn depends(&self) -> impl Iterator<Item = String> {
        self.all("depends").flat_map(|v| v.split(',')).filter(|v| !v.is_empty()).map(canonical)
    }

    fn soft(&self) -> impl Iterator<Item = String> {
        let words = self.all("softdep").flat_map(str::split_whitespace);
        words.map(|w| w.trim_start_matches("pre:").trim_start_matches("post:")).filter(|w| !w.is_empty()).map(canonical)
    }
}

/// The kernel treats `-` and `_` in a module's name alike.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

/// The chosen modules of a module folder and all they depend on, by name.
///
/// # Errors
/// A module cannot be read or unpacked.
pub(super) fn choose(programs: &Unpacked, folder: &Path) -> Result<BTreeMap<String, Module>> {
    let mut files = BTreeMap::new();
    collect(folder, &folder.join("kernel"), &mut files)?;
    let mut wanted: Vec<String> = SINGLE.iter().map(|n| canonical(n)).collect();
    for (name, path) in &files {
        let below = path.strip_prefix("kernel/").unwrap_or(path);
        if FOLDERS.iter().any(|f| below.strip_prefix(f).is_some_and(|rest| rest.starts_with('/'))) {
            wanted.push(name.clone());
        }
    }
    let mut chosen = BTreeMap::new();
    while let Some(name) = wanted.pop() {
        let Some(path) = files.get(&name) else { continue };
        if chosen.contains_key(&name) {
            continue;
        }
        let object = unpack(programs, &folder.join(path)).with_context(|| format!("module {path}"))?;
        let info = modinfo(&object).with_context(|| format!("module {path} is no ELF object with .modinfo"))?;
        let module = Module { path: plain(path).to_owned(), object, info };
        wanted.extend(module.depends().chain(module.soft()));
        chosen.insert(name, module);
    }
    Ok(chosen)
}

fn collect(root: &Path, dir: &Path, files: &mut BTreeMap<String, String>) -> Result<()> {
    for entry in std::fs::read_dir(dir).with_context(|| dir.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            collect(root, &path, files)?;
        } else if let Ok(below) = path.strip_prefix(root)
            && let Some(below) = below.to_str()
            && let Some(name) = plain(below).rsplit('/').next().and_then(|n| n.strip_suffix(".ko"))
        {
            files.insert(canonical(name), below.to_owned());
        }
    }
    Ok(())
}

fn plain(path: &str) -> &str {
    [".xz", ".zst", ".gz"].iter().find_map(|suffix| path.strip_suffix(suffix)).unwrap_or(path)
}

fn unpack(programs: &Unpacked, path: &Path) -> Result<Vec<u8>> {
    let decompress = |program: &str| process::output_bytes(programs.command(program)?.arg("-dcq").arg(path));
    let suffix = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    let mut object = match suffix {
        "ko" => std::fs::read(path)?,
        "xz" => decompress("xz")?,
        "zst" => decompress("zstd")?,
        "gz" => decompress("gzip")?,
        other => bail!("unknown compression .{other}"),
    };
    cut_signature(&mut object);
    Ok(object)
}

/// Cuts the appended signature (include/linux/module_signature.h). Nothing enforces it in the guest, and checking one
/// costs milliseconds of emulated RSA for each module.
fn cut_signature(object: &mut Vec<u8>) {
    const MARK: &[u8] = b"~Module signature appended~\n";
    /// `struct module_signature`: its last four bytes are the length of the signature, big endian.
    const TRAILER: usize = 12;
    let Some(end) = object.strip_suffix(MARK).map(<[u8]>::len) else { return };
    let length = end.checked_sub(4).and_then(|at| u32_be(object, at));
    if let Some(start) = length.and_then(|l| end.checked_sub(TRAILER)?.checked_sub(usize::try_from(l).ok()?)) {
        object.truncate(start);
    }
}

fn u32_be(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// The `key=value` strings of the section `.modinfo` of a 64-bit ELF object.
fn modinfo(object: &[u8]) -> Option<Vec<(String, String)>> {
    let elf = ElfFile64::<Endianness>::parse(object).ok()?;
    let text = String::from_utf8_lossy(elf.section_by_name(".modinfo")?.data().ok()?).into_owned();
    let pairs = text.split('\0').filter_map(|pair| pair.split_once('='));
    Some(pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
}

/// `modules.dep`, `modules.alias` and `modules.softdep`, by file name.
pub(super) fn indexes(modules: &BTreeMap<String, Module>) -> [(&'static str, String); 3] {
    let (mut dep, mut alias, mut soft) = (String::new(), String::new(), String::new());
    for (name, module) in modules {
        let paths: Vec<_> = closure(modules, name).iter().filter_map(|n| Some(modules.get(n)?.path.as_str())).collect();
        dep.push_str(&format!("{}:{}{}\n", module.path, if paths.is_empty() { "" } else { " " }, paths.join(" ")));
        for pattern in module.all("alias") {
            alias.push_str(&format!("alias {pattern} {name}\n"));
        }
        for rule in module.all("softdep") {
            soft.push_str(&format!("softdep {name} {rule}\n"));
        }
    }
    [("modules.dep", dep), ("modules.alias", alias), ("modules.softdep", soft)]
}

/// All that a module needs; what has to be loaded first stands last, as modprobe reads it.
fn closure(modules: &BTreeMap<String, Module>, name: &str) -> Vec<String> {
    fn visit(modules: &BTreeMap<String, Module>, name: &str, seen: &mut BTreeSet<String>, out: &mut Vec<String>) {
        for next in modules.get(name).into_iter().flat_map(Module::depends) {
            if modules.contains_key(&next) && seen.insert(next.clone()) {
                visit(modules, &next, seen, out);
                out.push(next);
            }
        }
    }
    let mut out = Vec::new();
    visit(modules, name, &mut BTreeSet::new(), &mut out);
    out.reverse();
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(name: &str, info: &[(&str, &str)]) -> (String, Module) {
        let info = info.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        (name.to_owned(), Module { path: format!("kernel/{name}.ko"), object: Vec::new(), info })
    }

    #[test]
    fn dependencies_load_before_their_users() {
        let modules = BTreeMap::from([
            module("a", &[("depends", "b,c"), ("alias", "rtnl-link-a")]),
            module("b", &[("depends", "d")]),
            module("c", &[("depends", "d,gone"), ("softdep", "pre: b")]),
            module("d", &[("depends", "")]),
        ]);
        let order = closure(&modules, "a");
        let at = |n: &str| order.iter().position(|x| x == n).unwrap();
        assert_eq!(order.len(), 3);
        assert!(at("d") > at("b") && at("d") > at("c"), "{order:?}");
        let [(_, dep), (_, alias), (_, soft)] = indexes(&modules);
        assert!(dep.contains("kernel/d.ko:\n") && dep.contains("kernel/b.ko: kernel/d.ko\n"));
        assert_eq!((alias.as_str(), soft.as_str()), ("alias rtnl-link-a a\n", "softdep c pre: b\n"));
    }

    #[test]
    fn soft_dependencies_lose_their_prefix() {
        let (_, m) = module("x", &[("softdep", "pre: crc32c-generic post: y")]);
        assert_eq!(m.soft().collect::<Vec<_>>(), ["crc32c_generic", "y"]);
    }

    #[test]
    fn signature_is_cut_and_only_a_whole_one() {
        let mut signed = b"ELFELF".to_vec();
        signed.extend([7; 5]);
        signed.extend([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5]);
        signed.extend(b"~Module signature appended~\n");
        cut_signature(&mut signed);
        assert_eq!(signed, b"ELFELF");
        let mut short = b"~Module signature appended~\n".to_vec();
        cut_signature(&mut short);
        assert_eq!(short.len(), 28);
    }

    #[test]
    fn modinfo_of_a_hand_made_object() {
        // Header, then the data of two sections, then three section headers (elf(5)): none, the names, and .modinfo.
        let mut elf = vec![0; 0x40];
        elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        let names = b"\0.modinfo\0"; // at 0x40
        elf.extend(names);
        let info = b"license=GPL\0depends=a,b\0";
        let at = elf.len();
        elf.extend(info);
        let table = elf.len();
        elf[0x28..0x30].copy_from_slice(&(table as u64).to_le_bytes()); // e_shoff
        elf[0x34..0x36].copy_from_slice(&[64, 0]); // e_ehsize
        elf[0x3a..0x40].copy_from_slice(&[64, 0, 3, 0, 1, 0]); // e_shentsize, e_shnum, e_shstrndx
        for (name, kind, offset, size) in [(0u32, 0u32, 0, 0), (0, 3, 0x40, names.len()), (1, 1, at, info.len())] {
            let mut header = [0; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[4..8].copy_from_slice(&kind.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&(offset as u64).to_le_bytes());
            header[0x20..0x28].copy_from_slice(&(size as u64).to_le_bytes());
            elf.extend(header);
        }
        let pairs = modinfo(&elf).unwrap();
        assert_eq!(pairs, [("license".into(), "GPL".into()), ("depends".into(), "a,b".into())]);
        assert_eq!(modinfo(&elf[..0x48]), None);
        assert_eq!(modinfo(b"\x7fELF\x01\x01"), None);
    }
}
