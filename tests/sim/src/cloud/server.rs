//! HTTP: from a request to its answer, by way of counters, limits, faults and delays.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{ConnectInfo, State};
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header, request};
use serde_json::{Value, json};
use tracing::debug;

use super::auth::{Call, Incoming};
use super::calls::CallRecord;
use super::faults::FaultKind;
use super::reply::Refusal;
use super::timeline::Completion;
use super::{Inner, actions, metadata, scenario, timeline};

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
    let mut record = CallRecord {
        number: 0,
        at_ms: 0,
        action: String::new(),
        token: None,
        subject: None,
        code: String::new(),
        lost: false,
        request_id: String::new(),
    };
    let (action, result) = match verified {
        Ok(call) => {
            let named = |name| call.parameters.get(name).map(str::to_owned);
            (record.token, record.subject) = (named("ClientToken"), named("NetworkInterfaceId"));
            (call.action.clone(), execute(inner, call).await)
        }
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
    record.action.clone_from(&action);
    record.code = result.as_ref().err().map(|refusal| refusal.code.clone()).unwrap_or_default();
    record.lost = lost || garbled;
    record.request_id.clone_from(&request_id);
    debug!(action, request_id, lost, refused = record.code, "OpenAPI call");
    inner.calls.lock().enter(record);
    scenario::called(inner, &action);
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

/// What goes wrong with one call.
#[derive(Default)]
struct CallFaults {
    delay: u64,
    lost: bool,
    garbled: bool,
    twice: bool,
    most: Option<u32>,
    later: Option<u64>,
    completion: Completion,
}

fn call_faults(struck: Vec<FaultKind>) -> Result<CallFaults, Refusal> {
    let mut call_faults = CallFaults::default();
    for kind in struck {
        match kind {
            FaultKind::Error { code, status } => {
                return Err(Refusal::new(status, &code, "This fault was ordered."));
            }
            FaultKind::Delay { ms } => call_faults.delay += ms,
            FaultKind::LoseReply => call_faults.lost = true,
            FaultKind::Garble => call_faults.garbled = true,
            FaultKind::Duplicate => call_faults.twice = true,
            FaultKind::EffectLater { ms } => call_faults.later = Some(ms),
            FaultKind::Partial { most } => call_faults.most = Some(most),
            FaultKind::SlowEnd { ms } => call_faults.completion.longer += Duration::from_millis(ms),
            FaultKind::FailEnd => call_faults.completion.fails = true,
            FaultKind::NoNic => call_faults.completion.no_nic = true,
        }
    }
    Ok(call_faults)
}

async fn execute(inner: &Arc<Inner>, call: Call) -> Result<Done, Refusal> {
    if !inner.buckets.lock().admit(&call.action, Instant::now()) {
        return Err(Refusal::new(400, "Throttling.User", "Request was denied due to user flow control."));
    }
    let latency = {
        let state = inner.state.lock();
        let by_action = &state.config.latency_ms;
        by_action.get(&call.action).or_else(|| by_action.get("")).copied().unwrap_or(0)
    };
    let struck = inner.faults.lock().faults_for(&call.action);
    let call_faults = call_faults(struck)?;
    let CallFaults { lost, garbled, completion, .. } = call_faults;
    if latency + call_faults.delay > 0 {
        tokio::time::sleep(Duration::from_millis(latency + call_faults.delay)).await;
    }
    let most = call_faults.most.unwrap_or(u32::MAX).max(1);
    let run = move |inner: &Arc<Inner>, call: &Call| {
        let (value, follow_up) =
            inner.alter(|vpc| actions::run(vpc, &call.version, &call.action, &call.parameters, most))?;
        timeline::begin(inner, follow_up, completion);
        Ok(value)
    };
    let answers_nothing = ["Attach", "Detach", "Delete", "Unassign"].iter().any(|verb| call.action.starts_with(verb));
    if let Some(ms) = call_faults.later.filter(|_| answers_nothing) {
        let inner = Arc::clone(inner);
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(ms)).await;
            // Its refusal would come too late.
            let _unheard: Result<Value, Refusal> = run(&inner, &call);
        });
        return Ok(Done { value: json!({}), lost, garbled });
    }
    let mut result = run(inner, &call);
    if call_faults.twice {
        result = run(inner, &call);
    }
    Ok(Done { value: result?, lost, garbled })
}

async fn ask_metadata(inner: &Arc<Inner>, from: SocketAddr, head: &request::Parts) -> Response {
    let path = head.uri.path().trim_start_matches("/latest/").trim_start_matches("meta-data/");
    let mut lost = false;
    let mut ordered = None;
    let struck = inner.faults.lock().faults_for(&format!("metadata/{path}"));
    for kind in struck {
        match kind {
            FaultKind::Error { status, .. } => ordered = ordered.or(StatusCode::from_u16(status).ok()),
            FaultKind::Delay { ms } => tokio::time::sleep(Duration::from_millis(ms)).await,
            FaultKind::LoseReply | FaultKind::Garble => lost = true,
            // For calls that change something.
            _ => {}
        }
    }
    let (status, text) = match (ordered, inner.who(from)) {
        (Some(status), _) => (status, String::new()),
        (None, Some(node)) => metadata::answer(inner, &node, &head.method, head.uri.path(), &head.headers),
        (None, None) => (StatusCode::NOT_FOUND, format!("no instance has the address {}", from.ip())),
    };
    let code = if status.is_success() { String::new() } else { status.as_str().to_owned() };
    inner.calls.lock().enter(CallRecord {
        number: 0,
        at_ms: 0,
        action: "metadata".to_owned(),
        token: None,
        subject: Some(path.to_owned()),
        code,
        lost,
        request_id: String::new(),
    });
    scenario::called(inner, "metadata");
    if lost { broken_connection() } else { (status, text).into_response() }
}

pub(super) fn reply(status: StatusCode, value: &Value) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json;charset=utf-8")], value.to_string()).into_response()
}

/// An answer whose body fails before its first byte, on which the server drops the connection.
fn broken_connection() -> Response {
    let nothing = futures_util::stream::once(async {
        Err::<Bytes, _>(std::io::Error::new(std::io::ErrorKind::ConnectionReset, "this fault was ordered"))
    });
    Response::new(Body::from_stream(nothing))
}
