//! Every decision of the node, and nothing else: what goes in are events, facts and a [`clock::Moment`]; what comes out are
//! effects, plans and documents as data. `terway-daemon` runs them. This crate has no tokio, no netlink, no aya and no clock,
//! so a restart is a replay and every rule is an ordinary unit test.

pub mod cidr;
pub mod clock;
pub mod cloud;
pub mod cni;
pub mod config;
pub mod conntrack;
pub mod errors;
pub mod ident;
pub mod ipam;
pub mod kube_writes;
pub mod machine;
pub mod objects;
pub mod policy;
pub mod reconcile;
pub mod route;
pub mod service;
