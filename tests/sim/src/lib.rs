//! A cloud on one machine: the ECS/VPC OpenAPI and metadata servers, and the wire they command.

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
