//! The address pool against a model of everything around it: a cloud that hands out real addresses and fails, a kernel that remembers what is
//! wired, a store that keeps a prefix of the writes, and an engine that runs effects in any order the contract allows and dies at any point.

mod cloud;
mod random;
mod rules;
mod world;
