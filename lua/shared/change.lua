-- Writes one change of what a member holds in a medium: a chain that it has from this depth on, or, without a depth, a
-- chain whose last chunk it has lost. `keys`: the engine's keys of the chunks, or what to resume with. Returns a word
-- of the reply, and what belongs to it.
local function change(member, epoch, max_run, medium, depth, chain, keys)
  local holder = member .. '@' .. medium
  if depth == '' then
    local taken, problem, _, word, resume = withdraw(chain, holder, epoch, keys)
    return taken and (word == 'again' and 'again ' .. resume or word) or problem.err
  end
  local done, problem = publish(chain, tonumber(depth), '', {
    now = ('%.0f'):format(now), max_run = max_run, holder = holder, epoch = epoch,
    column = 'e:', width = #keys * 16 / #chain, ids = keys,
  })
  return done and done.word .. table.concat(done.starts, ' ') or problem.err
end
