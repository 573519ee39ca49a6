//! Batched deletion of the links of deleted pods.
//!
//! Deleting veth pairs costs one RCU grace period under RTNL, some 25 ms in which no pod can be wired, however many pairs go at once. So they
//! are collected for a while; most are gone by then, because the runtime removed their namespace.

use std::sync::Arc;
use std::time::Duration;

use terway_core::errors::{self, Error};
use terway_core::route::PodPlan;
use tokio::sync::{mpsc, oneshot};

use super::pod::net_error;
use crate::net::Host;
use crate::supervise;

/// Time for which links are collected. A deleted pod's address starts to cool only afterwards.
const COLLECT_FOR: Duration = Duration::from_millis(100);

struct Job {
    plan: PodPlan,
    done: oneshot::Sender<Result<(), Error>>,
}

/// The handle of the deleting task; the task ends with its last handle.
#[derive(Clone)]
pub(super) struct Reaper(mpsc::UnboundedSender<Job>);

impl Reaper {
    pub(super) fn start(host: Arc<Host>) -> Self {
        let (sender, mut jobs) = mpsc::unbounded_channel::<Job>();
        supervise::spawn("link-reaper", async move {
            while let Some(first) = jobs.recv().await {
                tokio::time::sleep(COLLECT_FOR).await;
                let mut batch = vec![first];
                while let Ok(job) = jobs.try_recv() {
                    batch.push(job);
                }
                delete(&host, batch).await;
            }
        });
        Self(sender)
    }

    /// Deletes a pod's links with the next batch; returns when they are gone.
    pub(super) async fn delete(&self, plan: PodPlan) -> Result<(), Error> {
        let gone = || Error::new(errors::INTERNAL, "the deleting task is gone");
        let (done, result) = oneshot::channel();
        if self.0.send(Job { plan, done }).is_err() {
            return Err(gone());
        }
        result.await.unwrap_or_else(|_| Err(gone()))
    }
}

async fn delete(host: &Host, batch: Vec<Job>) {
    let plans = batch.iter().map(|job| job.plan.clone()).collect();
    let all = host.delete_links(plans).await;
    for Job { plan, done } in batch {
        // One that cannot go must not hold up the others: each is asked for by itself then.
        let result = match &all {
            Ok(()) => Ok(()),
            Err(_) => host.delete_link(&plan).await.map_err(net_error),
        };
        let _ = done.send(result);
    }
}
