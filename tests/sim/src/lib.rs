//! A cloud on one machine: the ECS/VPC OpenAPI and metadata servers, and the wire they command.

pub mod cloud;
pub mod fabric;
