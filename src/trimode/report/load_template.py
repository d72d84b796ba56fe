"""Holds the template of the page of load tests."""

from __future__ import annotations

TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'">
<title>Load test{{ "s" if results | length > 1 }}</title>
<style>
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1400px; margin: 2rem auto;
 padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid var(--line);
 white-space: nowrap; }
th:first-child, td:first-child, .text { text-align: left; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; }
dt { opacity: .7; } dd { margin: 0; overflow-wrap: anywhere; }
svg { width: 100%; max-width: 860px; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: currentColor; } svg .label { font-size: 11px; opacity: .8; }
svg .grid { stroke: var(--line); }
.bad { border: 2px solid #dc2626; padding: .5rem 1rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>Load test{{ "s" if results | length > 1 }}</h1>
{% for name, result in results if result.partial or (result.check and result.check.differing) %}
<div class="bad">
{% if result.partial %}
<p>{{ name }}: interrupted. The figures cover what was measured until then.</p>
{% endif %}
{% if result.check and result.check.differing %}
<p>{{ name }}: {{ result.check.differing }} of {{ result.check.compared }} greedy answers differ
from the answer to the same request alone.</p>
{% for one in result.check.differences %}
<p>{{ one.question_id }}, turn {{ one.turn + 1 }}: expected</p>
<pre>{{ one.expected }}</pre><p>found</p><pre>{{ one.found }}</pre>
{% endfor %}
{% endif %}
</div>
{% endfor %}
<figure>
{{ figure | safe }}
<figcaption>Each point is a run, labelled with its clients or rate. Up and to the right is
better.</figcaption>
</figure>
{% for name, result in results %}
<h2>{{ name }}</h2>
<div class="scroll"><table>
<tr><th>mode</th><th class="text">load</th>
{% for column in columns %}<th>{{ column.heading }}</th>{% endfor %}</tr>
{% for run in result.runs %}
<tr><td>{{ mode_name(run) }}</td>
<td class="text">{{ run_name(run) }}{{ " (interrupted)" if run.partial }}</td>
{% for cell in cells(run) %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% for run in result.runs if run.errors %}
<p>{{ mode_name(run) }}, {{ run_name(run) }} failed:
{% for error, count in run.errors.items() %}{{ count }} times {{ error }}{{ "; " if not loop.last }}
{% endfor %}</p>
{% endfor %}
<h3>Server and client</h3>
<div class="scroll"><table>
<tr><th>mode</th><th class="text">load</th><th>prompt tokens reused</th><th>rows per forward</th>
<th>mode switches</th><th class="text">forwards by graph</th><th>server CPU</th>
<th>memory, first</th><th>memory, last</th><th>client CPU</th></tr>
{% for run in result.runs %}
{% set it = run.served %}
<tr><td>{{ mode_name(run) }}</td><td class="text">{{ run_name(run) }}</td>
<td>{{ "%.1f%%" % (100 * it.hit_rate) if it.hit_rate is not none }}</td>
<td>{{ "%.2f" % it.rows_per_forward if it.rows_per_forward is not none }}</td>
<td>{{ it.mode_switches if it.mode_switches is not none }}</td>
<td class="text">{% for graph, share in it.forward_share.items() %}
{{ graph }} {{ "%.0f%%" % (100 * share) }} {% endfor %}</td>
<td>{{ "%.2f" % it.cpu_share if it.cpu_share is not none }}</td>
<td>{{ it.rss_first_bytes | mib if it.rss_first_bytes is not none }}</td>
<td>{{ it.rss_last_bytes | mib if it.rss_last_bytes is not none }}</td>
<td>{{ "%.2f" % run.client_cpu_share }}</td></tr>
{% endfor %}
</table></div>
{% if result.runs | selectattr("acceptance") | list %}
<h3>Acceptance by category</h3>
<div class="scroll"><table>
<tr><th>mode</th><th class="text">load</th><th class="text">category</th><th>length</th>
<th>rate</th><th>steps</th></tr>
{% for run in result.runs if run.acceptance %}
{% for category, one in [("all", run.acceptance)] + run.acceptance_by_category.items() | list %}
<tr><td>{{ mode_name(run) }}</td><td class="text">{{ run_name(run) }}</td>
<td class="text">{{ category }}</td><td>{{ "%.2f" % one.mean_acceptance_length }}</td>
<td>{{ "%.1f%%" % (100 * one.draft_acceptance_rate) }}</td><td>{{ one.num_spec_steps }}</td></tr>
{% endfor %}
{% endfor %}
</table></div>
{% endif %}
{% if result.check and not result.check.differing %}
<p>All {{ result.check.compared }} greedy answers equal the answer to the same request alone.</p>
{% endif %}
<dl>
{% for fact, value in facts(result).items() %}
<dt>{{ fact }}</dt><dd>{{ value }}</dd>
{% endfor %}
</dl>
{% endfor %}
<h2>What is measured</h2>
<p>TTFT is the time to the first text. TPOT is the time after it per further token, and the
figure to compare modes by. ITL is the time between two events with text; a block of tokens is one
event. E2EL is the time to the last event. Per user is the total
divided by the clients. Acceptance lengths count the bonus token, as in vLLM.</p>
</body>
</html>
"""
"""Source of the template."""
