//! The admin endpoint: what [`CloudSim`](super::CloudSim) can do, as JSON over HTTP. Its paths are listed at
//! [`CloudSim::serve_admin`](super::CloudSim::serve_admin).

use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use http::StatusCode;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::admin_actions::AdminAction;
use super::faults::Fault;
use super::scenario::{self, Scenario};
use super::server::reply;
use super::{CallRecord, Inner};

type Cloud = State<Arc<Inner>>;

pub(super) fn router(inner: Arc<Inner>) -> Router {
    Router::new()
        .route("/state", get(state))
        .route("/calls", get(calls).delete(forget))
        .route("/log", get(log))
        .route("/faults", get(faults).put(set_faults).post(add_faults))
        .route("/orders", post(orders))
        .route("/scenario", get(open).put(play))
        .with_state(inner)
}

fn json_reply<T: Serialize>(value: &T) -> Response {
    match serde_json::to_value(value) {
        Ok(value) => reply(StatusCode::OK, &value),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// Reads the body and does something with it; what is wrong with either is answered.
fn with<T: DeserializeOwned>(body: &Bytes, f: impl FnOnce(T) -> anyhow::Result<Value>) -> Response {
    match serde_json::from_slice(body).map_err(anyhow::Error::from).and_then(f) {
        Ok(value) => reply(StatusCode::OK, &value),
        Err(error) => (StatusCode::BAD_REQUEST, format!("{error:#}\n")).into_response(),
    }
}

async fn state(State(inner): Cloud) -> Response {
    let state = inner.state.lock();
    let enis: Vec<_> = state.enis.values().collect();
    json_reply(&json!({"enis": enis}))
}

async fn calls(State(inner): Cloud) -> Response {
    json_reply(inner.calls.lock().counts())
}

async fn forget(State(inner): Cloud) -> Response {
    inner.calls.lock().clear();
    json_reply(&json!({}))
}

#[derive(Deserialize)]
struct After {
    #[serde(default)]
    after: u64,
}

async fn log(State(inner): Cloud, Query(After { after }): Query<After>) -> Response {
    let calls = inner.calls.lock();
    json_reply(&calls.records().filter(|record| record.number > after).collect::<Vec<&CallRecord>>())
}

async fn faults(State(inner): Cloud) -> Response {
    json_reply(&inner.faults.lock().list())
}

async fn set_faults(State(inner): Cloud, body: Bytes) -> Response {
    with(&body, |faults: Vec<Fault>| inner.apply_action(AdminAction::Faults(faults)).map(|()| json!({})))
}

async fn add_faults(State(inner): Cloud, body: Bytes) -> Response {
    with(&body, |faults: Vec<Fault>| inner.apply_action(AdminAction::AddFaults(faults)).map(|()| json!({})))
}

#[derive(Deserialize)]
#[serde(untagged)]
enum AdminActions {
    Many(Vec<AdminAction>),
    One(AdminAction),
}

async fn orders(State(inner): Cloud, body: Bytes) -> Response {
    with(&body, |orders: AdminActions| {
        let orders = match orders {
            AdminActions::Many(orders) => orders,
            AdminActions::One(order) => vec![order],
        };
        orders.into_iter().try_for_each(|order| inner.apply_action(order)).map(|()| json!({}))
    })
}

async fn open(State(inner): Cloud) -> Response {
    json_reply(&json!({"open": scenario::open(&inner)}))
}

async fn play(State(inner): Cloud, body: Bytes) -> Response {
    with(&body, |scenario: Scenario| {
        scenario::begin(&inner, scenario);
        Ok(json!({"open": scenario::open(&inner)}))
    })
}
