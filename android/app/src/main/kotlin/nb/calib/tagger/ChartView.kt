package nb.calib.tagger

import android.content.Context
import android.graphics.Canvas
import android.graphics.Paint
import android.util.AttributeSet
import android.view.View

/** Time of each run over the seconds of the benchmark: a dot per visit, a line at the median. */
class ChartView(context: Context, attributes: AttributeSet?) : View(context, attributes) {
    private val density = resources.displayMetrics.density
    private val words = Paint(Paint.ANTI_ALIAS_FLAG).apply { textSize = 12 * resources.displayMetrics.scaledDensity }
    private val stroke = Paint(Paint.ANTI_ALIAS_FLAG)
    private var at = doubleArrayOf()
    private var ms = doubleArrayOf()

    fun show(report: Report) {
        val step = maxOf(1, report.results.size / MOST)
        val shown = report.results.filterIndexed { k, _ -> k % step == 0 }
        at = DoubleArray(shown.size) { shown[it].at }
        ms = DoubleArray(shown.size) { shown[it].runMs }
        invalidate()
    }

    override fun onDraw(canvas: Canvas) {
        super.onDraw(canvas)
        if (ms.isEmpty()) return
        val axes = Axes(at, ms)
        val left = words.measureText(axes.topLabel) + 8 * density
        val bottom = height - 2.2f * words.textSize
        val top = words.textSize
        val right = width - 8 * density
        fun x(value: Double) = left + (right - left) * axes.x(value).toFloat()
        fun y(value: Double) = bottom - (bottom - top) * axes.y(value).toFloat()
        words.color = context.getColor(R.color.faint)
        stroke.color = context.getColor(R.color.grid)
        stroke.strokeWidth = density
        for (tick in axes.ticks) {
            canvas.drawLine(left, y(tick), right, y(tick), stroke)
            canvas.drawText(axes.label(tick), 0f, y(tick) + words.textSize / 3, words)
        }
        canvas.drawText(context.getString(R.string.chart_y), 0f, top - words.textSize / 4, words)
        canvas.drawText("0", left, height - words.textSize / 2, words)
        val end = axes.label(at.last()) + " " + context.getString(R.string.chart_x)
        canvas.drawText(end, right - words.measureText(end), height - words.textSize / 2, words)
        stroke.color = context.getColor(R.color.accent)
        for (k in ms.indices) canvas.drawCircle(x(at[k]), y(ms[k]), 2.5f * density, stroke)
        stroke.color = context.getColor(R.color.second)
        stroke.strokeWidth = 2 * density
        val median = y(Numbers.quantile(ms, 0.5))
        canvas.drawLine(left, median, right, median, stroke)
    }

    private companion object {
        const val MOST = 2000 // dots
    }
}
