//! HTTP: from a request to its answer, by way of counters, limits, faults and delays.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{ConnectInfo, State};
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, Method, StatusCode, header, request};
use serde_json::{Value, json};
use tracing::debug;

use super::auth::{Call, Incoming};
use super::faults::{Fault, FaultKind};
use super::reply::Refusal;
use super::{Inner, actions, metadata, timeline};

/// No request has more; the longest is a `DescribeNetworkInterfaces` with 100 ids.
const BODY_LIMIT: usize = 1 << 20;

pub(super) fn router(inner: Arc<Inner>) -> Router {
    Router::new().fallback(handle).with_state(inner)
}

async fn handle(
    State(inner): State<Arc<Inner>>,
    ConnectInfo(from): ConnectInfo<SocketAddr>,
    request: http::Request<Body>,
) -> Response {
    let (head, body) = request.into_parts();
    let Ok(body) = axum::body::to_bytes(body, BODY_LIMIT).await else {
        return StatusCode::PAYLOAD_TOO_LARGE.into_response();
    };
    let date = httpdate::fmt_http_date(inner.now());
    // In a task of its own: a caller that hangs up does not undo its call.
    let task = tokio::spawn(async move {
        let path = head.uri.path();
        if path.starts_with("/latest/") {
            ask_metadata(&inner, from, &head).await
        } else if let Some(item) = path.strip_prefix("/_sim/") {
            admin(&inner, &head.method, item, &body)
        } else {
            openapi(&inner, &head, &body).await
        }
    });
    let mut response =
        task.await.unwrap_or_else(|panic| (StatusCode::INTERNAL_SERVER_ERROR, panic.to_string()).into_response());
    if let Ok(date) = HeaderValue::from_str(&date) {
        response.headers_mut().insert(header::DATE, date);
    }
    response
}

async fn openapi(inner: &Arc<Inner>, head: &request::Parts, body: &Bytes) -> Response {
    let path = head.uri.path();
    let query = head.uri.query().unwrap_or_default();
    let incoming = Incoming { method: head.method.as_str(), path, query, headers: &head.headers, body };
    let verified = inner.keys.lock().verify(&incoming, inner.now());
    let (action, result) = match verified {
        Ok(call) => (call.action.clone(), perform(inner, &call).await),
        Err(refusal) => {
            let named = head.headers.get("x-acs-action").and_then(|action| action.to_str().ok());
            (named.unwrap_or("unverified").to_owned(), Err(refusal))
        }
    };
    let request_id = inner.state.lock().request_id();
    let (lost, garbled) = match &result {
        Ok(done) => (done.lost, done.garbled),
        Err(_) => (false, false),
    };
    {
        let mut calls = inner.calls.lock();
        let calls = calls.entry(action.clone()).or_default();
        calls.total += 1;
        calls.lost += u64::from(lost || garbled);
        if let Err(refusal) = &result {
            *calls.refused.entry(refusal.code.clone()).or_default() += 1;
        }
    }
    debug!(
        action,
        request_id,
        lost,
        refused = result.as_ref().err().map(|refusal| refusal.code.as_str()),
        "OpenAPI call"
    );
    match result {
        _ if lost => broken_connection(),
        Ok(_) if garbled => reply(StatusCode::OK, &json!({"RequestId": request_id, "Garbled": true})),
        Ok(Done { mut value, .. }) => {
            value["RequestId"] = request_id.into();
            reply(StatusCode::OK, &value)
        }
        Err(refusal) => {
            let host = head.headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
            let value = json!({
                "RequestId": request_id,
                "HostId": host,
                "Code": refusal.code,
                "Message": refusal.message,
                "Recommend": format!("https://api.aliyun.com/troubleshoot?q={}", refusal.code),
            });
            reply(StatusCode::from_u16(refusal.status).unwrap_or(StatusCode::BAD_REQUEST), &value)
        }
    }
}

struct Done {
    value: Value,
    lost: bool,
    garbled: bool,
}

async fn perform(inner: &Arc<Inner>, call: &Call) -> Result<Done, Refusal> {
    if !inner.buckets.lock().admit(&call.action, Instant::now()) {
        return Err(Refusal::new(400, "Throttling.User", "Request was denied due to user flow control."));
    }
    let latency = {
        let state = inner.state.lock();
        let by_action = &state.config.latency_ms;
        by_action.get(&call.action).or_else(|| by_action.get("")).copied().unwrap_or(0)
    };
    let (mut delay, mut lost, mut garbled) = (latency, false, false);
    let struck = inner.faults.lock().strike(&call.action);
    for kind in struck {
        match kind {
            FaultKind::Error { code, status } => {
                return Err(Refusal::new(status, &code, "This fault was ordered."));
            }
            FaultKind::Delay { ms } => delay += ms,
            FaultKind::LoseReply => lost = true,
            FaultKind::Garble => garbled = true,
        }
    }
    if delay > 0 {
        tokio::time::sleep(Duration::from_millis(delay)).await;
    }
    let (value, follow) = actions::run(&mut inner.state.lock(), &call.version, &call.action, &call.parameters)?;
    timeline::begin(inner, follow);
    Ok(Done { value, lost, garbled })
}

async fn ask_metadata(inner: &Arc<Inner>, from: SocketAddr, head: &request::Parts) -> Response {
    let mut lost = false;
    let mut ordered = None;
    let struck = inner.faults.lock().strike("metadata");
    for kind in struck {
        match kind {
            FaultKind::Error { status, .. } => ordered = ordered.or(StatusCode::from_u16(status).ok()),
            FaultKind::Delay { ms } => tokio::time::sleep(Duration::from_millis(ms)).await,
            FaultKind::LoseReply | FaultKind::Garble => lost = true,
        }
    }
    let (status, text) = match (ordered, inner.who(from)) {
        (Some(status), _) => (status, String::new()),
        (None, Some(node)) => metadata::answer(inner, &node, &head.method, head.uri.path(), &head.headers),
        (None, None) => (StatusCode::NOT_FOUND, format!("no instance has the address {}", from.ip())),
    };
    {
        let mut calls = inner.calls.lock();
        let calls = calls.entry("metadata".to_owned()).or_default();
        calls.total += 1;
        calls.lost += u64::from(lost);
        if !status.is_success() {
            *calls.refused.entry(status.as_str().to_owned()).or_default() += 1;
        }
    }
    if lost { broken_connection() } else { (status, text).into_response() }
}

/// For tests and people: `GET /_sim/state`, `GET /_sim/calls`, `GET|PUT /_sim/faults` (a JSON list, replacing all).
fn admin(inner: &Arc<Inner>, method: &Method, item: &str, body: &Bytes) -> Response {
    let answer = |value: serde_json::Result<Value>| match value {
        Ok(value) => reply(StatusCode::OK, &value),
        Err(error) => (StatusCode::BAD_REQUEST, error.to_string()).into_response(),
    };
    match (method, item) {
        (&Method::GET, "state") => {
            let state = inner.state.lock();
            let enis: Vec<_> = state.enis.values().collect();
            answer(serde_json::to_value(enis).map(|enis| json!({"enis": enis})))
        }
        (&Method::GET, "calls") => answer(serde_json::to_value(&*inner.calls.lock())),
        (&Method::GET, "faults") => answer(serde_json::to_value(inner.faults.lock().list())),
        (&Method::PUT, "faults") => answer(serde_json::from_slice::<Vec<Fault>>(body).map(|faults| {
            let number = faults.len();
            inner.faults.lock().set(faults);
            json!({"set": number})
        })),
        _ => StatusCode::NOT_FOUND.into_response(),
    }
}

fn reply(status: StatusCode, value: &Value) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json;charset=utf-8")], value.to_string()).into_response()
}

/// An answer whose body fails before its first byte, on which the server drops the connection.
fn broken_connection() -> Response {
    let nothing = futures_util::stream::once(async {
        Err::<Bytes, _>(std::io::Error::new(std::io::ErrorKind::ConnectionReset, "this fault was ordered"))
    });
    Response::new(Body::from_stream(nothing))
}
