//! The task that annotates the node's pods with their addresses (`enable_patch_pod_ips`).

use std::sync::Arc;

use serde_json::json;
use terway_core::clock::Moment;
use terway_core::kube_writes::{FIELD_MANAGER, POD_IPS, pod_ips};
use terway_core::objects::ObjectName;

use super::api::Outcome;
use super::{DEBOUNCE, KubeWrites, NodeState};
use crate::actor::sleep_until;
use crate::objects::{ApiClient, PatchType};

/// An annotation to be written.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Annotation {
    pod: ObjectName,
    uid: Box<str>,
    value: String,
}

impl KubeWrites {
    /// Compares the annotations of the attached pods with their addresses, at every change of either, as long as the daemon runs.
    pub(super) async fn write_pods(self: Arc<Self>, api: Arc<ApiClient>, state: Arc<dyn NodeState>) {
        let (mut pool, mut objects) = (state.changed(), self.delivered.subscribe());
        let mut config = self.config.clone();
        let mut limiter = self.limiter::<Annotation>();
        let mut pauses = self.pauses();
        loop {
            pool.borrow_and_update();
            objects.borrow_and_update();
            let is_enabled = config.borrow_and_update().patch_pod_ips;
            let wanted = if is_enabled { self.missing_annotations(&*state) } else { Vec::new() };
            let mut due: Option<Moment> = None;
            for annotation in wanted {
                if let Err(moment) = limiter.check(&annotation, self.now()) {
                    due = Some(due.map_or(moment, |due| due.min(moment)));
                    continue;
                }
                match self.annotate(&api, &annotation).await {
                    Outcome::Written => {
                        limiter.written(annotation, self.now());
                        pauses = self.pauses();
                    }
                    // Deleted meanwhile; or an admission webhook refuses this one.
                    Outcome::Missing | Outcome::Conflict | Outcome::Refused => {
                        limiter.written(annotation, self.now());
                    }
                    Outcome::Failed => {
                        // Not sooner, whatever changes meanwhile.
                        tokio::time::sleep(pauses.next().unwrap_or_default()).await;
                        due = Some(self.now());
                        break;
                    }
                }
            }
            tokio::select! {
                changed = pool.changed() => if changed.is_err() { return },
                changed = objects.changed() => if changed.is_err() { return },
                changed = config.changed() => if changed.is_err() { return },
                () = sleep_until(due.map(|moment| self.instant(moment))) => {}
            }
            tokio::time::sleep(self.scaled(DEBOUNCE)).await;
        }
    }

    fn missing_annotations(&self, state: &dyn NodeState) -> Vec<Annotation> {
        let attached = state.attached();
        let objects = self.objects.read();
        let missing = attached.iter().filter_map(|(pod, addresses)| {
            let name = ObjectName::new(&pod.namespace, &pod.name);
            let object = objects.pods().get(&name)?;
            let value = pod_ips(object, &pod.uid, addresses)?;
            Some(Annotation { pod: name, uid: object.meta.uid.clone(), value })
        });
        missing.collect()
    }

    /// Server-side apply: this field is ours, whoever had it, and no other is touched. The UID keeps a pod of the same name from getting it.
    async fn annotate(&self, api: &ApiClient, Annotation { pod, uid, value }: &Annotation) -> Outcome {
        let (namespace, name) = (&*pod.namespace, &*pod.name);
        let path = format!("/api/v1/namespaces/{namespace}/pods/{name}?fieldManager={FIELD_MANAGER}&force=true");
        let patch = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "namespace": namespace, "name": name, "uid": uid, "annotations": { POD_IPS: value } },
        });
        self.write("pod-annotation", api.patch(&path, PatchType::Apply, &patch)).await
    }
}
