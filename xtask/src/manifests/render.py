"""Renders a chart: file {"chart": FOLDER, "cases": [VALUES]}, standard output {"lint": {}, "cases": [{"text" or "error"}]}."""

import json
import sys

import helm_python as helm

with open(sys.argv[1], encoding="utf-8") as file:
    request = json.load(file)
cases = []
with helm.Chart.load(request["chart"]) as chart:
    for values in request["cases"]:
        try:
            chart.validate_schema(values)
            files = chart.render(values, name="terway", namespace="kube-system")
            cases.append({"text": "\n---\n".join(t for name, t in sorted(files.items()) if not name.endswith(".txt"))})
        except helm.HelmError as error:
            cases.append({"error": str(error)})
json.dump({"lint": helm.lint(request["chart"]), "cases": cases}, sys.stdout)
