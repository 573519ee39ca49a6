//! A cloud on one machine: the ECS/VPC OpenAPI and metadata servers, the wire they command, and nodes with real runtimes on it.

pub mod apiserver;
pub mod cgroup;
pub mod cloud;
pub mod cluster;
pub mod containerd;
pub mod cri;
pub mod demo;
pub mod fabric;
pub mod image;
pub mod leftovers;
pub mod netns;
pub mod node;
pub mod probe;
